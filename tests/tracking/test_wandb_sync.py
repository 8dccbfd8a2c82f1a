"""`upcycle sync`: what the server lacks is sent once, and what could not be sent is said."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import wandb
import wandb_records as made
from cli import process

from upcycle.errors import RecordError
from upcycle.tracking import wandb_mirror, wandb_sync
from upcycle.tracking.claim import claimed
from upcycle.tracking.config import SyncConfig
from upcycle.tracking.record import Record, read_run
from upcycle.tracking.wandb_sync import Synced, sync

if TYPE_CHECKING:
    from pathlib import Path

    from wandb_server import Server


def synced(place: Path, project: str | None = None) -> list[Synced]:
    return sync(SyncConfig(path=str(place), project=project, entity=None))


def assert_sent(server: Server, *directories: Path) -> None:
    """The one assertion, which every mutant must fail."""
    for directory in directories:
        kept = server.runs[read_run(directory)["wandb"]["id"]]
        assert made.shown(kept.history) == made.rows(directory)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run without a mirror."""
    record = made.begin(Record(tmp_path / "run"))
    made.log(record, 1, 6)
    record.describe(status="finished")
    return record.directory


def test_a_record_without_a_mirror(server: Server, finished: Path) -> None:
    (outcome,) = synced(finished)
    assert (outcome.rows, outcome.unsent, outcome.error) == (7, 0, None)
    assert_sent(server, finished)
    (kept,) = server.runs.values()
    assert (kept.project, kept.exit_code) == ("moe", 0)
    assert synced(finished) == [outcome]
    assert_sent(server, finished)


def test_offline_runs_through_w_and_bs_own_sync(server: Server, tmp_path: Path) -> None:
    """Two processes that kept rows offline, sent together."""
    made.train(tmp_path / "run", "offline", status="failed")
    made.train(tmp_path / "run", "offline", first=4, after=9)
    (outcome,) = synced(tmp_path)
    assert (outcome.unsent, outcome.error) == (0, None)
    assert_sent(server, tmp_path / "run")
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/*.wandb.synced"))) == 2


def test_rows_that_an_offline_run_lacks_come_from_the_record(server: Server, tmp_path: Path) -> None:
    """As after a kill: the log ends before the record does."""
    made.train(tmp_path / "run", "offline", status="running")
    made.log(Record(tmp_path / "run"), 6, 9)
    synced(tmp_path)
    assert_sent(server, tmp_path / "run")


def test_an_offline_run_that_was_sent_by_hand_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "offline")
    synced(tmp_path)
    next(tmp_path.glob("run/wandb/offline-run-*/*.wandb.synced")).unlink()
    Record(tmp_path / "run").describe(
        **read_run(tmp_path / "run") | {"wandb": read_run(tmp_path / "run")["wandb"] | {"rows": 0}}
    )
    synced(tmp_path)
    assert_sent(server, tmp_path / "run")


def test_rows_sent_twice_are_noticed(server: Server, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mutant: an offline run is sent without looking which rows it holds, on top of what is there."""
    made.train(tmp_path / "run", "offline")
    log = next(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    synced(tmp_path)
    wandb_sync.send_log(log)
    log.with_suffix(".wandb.synced").unlink()
    wandb_sync.send_log(log)
    with pytest.raises(AssertionError):
        assert_sent(server, tmp_path / "run")


def test_what_an_online_run_lost(server: Server, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client.setattr(wandb_mirror, "FINISH_SECONDS", 0.5)
    made.train(tmp_path / "run", "online", status="running")
    server.status = 401
    made.train(tmp_path / "run", "online", first=4, after=9)
    server.status = 200
    wandb.teardown()
    (outcome,) = synced(tmp_path)
    assert (outcome.unsent, outcome.error) == (0, None)
    assert_sent(server, tmp_path / "run")


def test_unreachable(client: pytest.MonkeyPatch, finished: Path, tmp_path: Path) -> None:
    """Every run is named as unsent, after one attempt."""
    client.setattr(wandb_mirror, "START_SECONDS", 0.5)
    made.log(made.begin(Record(tmp_path / "second")), 1, 3)
    tried: list[Path] = []
    attempt = wandb_sync._send
    client.setattr(wandb_sync, "_send", lambda place, *rest: tried.append(place) or attempt(place, *rest))
    one, other = synced(tmp_path)
    assert (one.unsent, other.unsent) == (7, 3)
    assert one.error == other.error
    assert tried == [finished]


def test_a_row_that_was_cut_off_is_not_sent(server: Server, finished: Path) -> None:
    with (finished / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "train/lo')
    (outcome,) = synced(finished)
    assert (outcome.rows, outcome.unsent) == (7, 0)
    assert [row["step"] for row in next(iter(server.runs.values())).history] == [1, 2, 2, 3, 4, 4, 5]


def test_others_are_sent_when_one_is_damaged(server: Server, finished: Path, tmp_path: Path) -> None:
    later = json.dumps(read_run(finished) | {"schema": 99})
    for name, content in {"alien": '{"lr": 1}', "damaged": "{", "later": later}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    (tmp_path / "later" / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text())
    alien, damaged, newer, run = synced(tmp_path)
    assert "not a training run of upcycle" in str(alien.error)
    assert "run.json is not JSON" in str(damaged.error)
    assert "another version of the schema" in str(newer.error)
    assert len(server.runs) == 1
    assert run.error is None
    assert_sent(server, finished)


def test_a_run_that_is_being_trained_is_left_alone(server: Server, finished: Path) -> None:
    with claimed(finished):
        (outcome,) = synced(finished)
    assert "another process" in str(outcome.error)
    assert not server.runs


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no runs found"):
        synced(tmp_path)


def test_a_run_from_before_there_were_mirrors(server: Server, finished: Path) -> None:
    content = read_run(finished)
    del content["config"]["wandb"]
    (finished / "run.json").write_text(json.dumps(content))
    (outcome,) = synced(finished)
    assert "project=" in str(outcome.error)
    synced(finished, project="late")
    assert [kept.project for kept in server.runs.values()] == ["late"]
    assert_sent(server, finished)


def test_the_command(server: Server, finished: Path, tmp_path: Path) -> None:
    ended = process("sync", finished, cwd=tmp_path)
    assert ended.status == 0, ended
    assert ended.out.startswith(f"sent    {finished}: 7 rows, {server.url}")
    server.status = 401
    made.log(Record(finished), 6, 7)
    ended = process("sync", finished, cwd=tmp_path)
    assert ended.status == 1
    assert ended.out.startswith(f"unsent  {finished}: 2 of 9 rows: ")
    assert "Traceback" not in ended.err
