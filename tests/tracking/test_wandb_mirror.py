"""The mirror holds the record's rows once each, in order, whatever interrupted what."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import wandb_records as made

from upcycle.tracking import wandb_mirror, wandb_training
from upcycle.tracking.record import Record, read_run
from upcycle.tracking.tags import sweep_tags
from upcycle.tracking.wandb_training import TrainingMirror

if TYPE_CHECKING:
    from pathlib import Path

    from wandb_server import Server


def history(directory: Path, server: Server | None) -> list[dict[str, Any]]:
    if server:
        return server.runs[read_run(directory)["wandb"]["id"]].history
    return made.offline_history(directory)


def assert_mirrors(directory: Path, server: Server | None = None) -> None:
    """The one assertion, which every mutant must fail."""
    assert made.shown(history(directory, server)) == made.rows(directory)


def test_offline(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "offline")
    assert_mirrors(tmp_path / "run")
    records = made.inspect(next(tmp_path.glob("run/wandb/offline-run-*/*.wandb")))
    kinds = {kind: [each[kind] for each in records if each["type"] == kind] for kind in ("run", "metric", "exit")}
    run = kinds["run"][0]
    assert (run["project"], run["run_group"], run["tags"], run["display_name"]) == ("moe", "order", ["smoke"], "run")
    assert run["run_id"] == read_run(tmp_path / "run")["wandb"]["id"]
    assert run["config"]["update"]["config"]["moe"] == {"top_k": 2}
    assert run["config"]["update"]["units"]["train/loss"] == "nats/token"
    metrics = {each["name"]: each for each in kinds["metric"]}
    assert {each.get("step_metric") for name, each in metrics.items() if name != "step"} == {"step"}
    assert metrics["train/grad_norm"]["summary"] == {"mean": True}
    assert [each["exit_code"] for each in kinds["exit"]] == [0]


def test_times_are_those_of_the_record(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "offline")
    times = [json.loads(line)["time"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stamps = [row["_timestamp"] for row in made.offline_history(tmp_path / "run")]
    assert stamps == pytest.approx([datetime.fromisoformat(time).timestamp() for time in times], abs=1e-3)


@pytest.mark.parametrize("online", [True, False])
def test_a_resumed_run_doubles_no_row(client: pytest.MonkeyPatch, server: Server, tmp_path: Path, online: bool) -> None:
    """It had rows to step 5, goes on from the checkpoint of step 3, and comes to step 8."""
    mode = "online" if online else "offline"
    made.train(tmp_path / "run", mode, status="failed")
    before = read_run(tmp_path / "run")["wandb"]["id"]
    made.train(tmp_path / "run", mode, first=4, after=9)
    assert read_run(tmp_path / "run")["wandb"]["id"] == before
    assert_mirrors(tmp_path / "run", server if online else None)


def test_rows_that_were_doubled_are_noticed(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mutant: a mirror that does not ask what is there."""
    client.setattr(wandb_training, "offline_rows", lambda _directory: 0)
    made.train(tmp_path / "run", "offline", status="failed")
    made.train(tmp_path / "run", "offline", first=4, after=9)
    with pytest.raises(AssertionError):
        assert_mirrors(tmp_path / "run")


def test_online(server: Server, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "online")
    assert_mirrors(tmp_path / "run", server)
    identity = read_run(tmp_path / "run")["wandb"]
    kept = server.runs[identity["id"]]
    assert (kept.project, kept.group, kept.tags, kept.exit_code) == ("moe", "order", ["smoke"], 0)
    assert identity["rows"] == 0  # that are known to have arrived: sync asks
    assert identity["url"].startswith(server.url)
    assert kept.summary["train/grad_norm"] == {"mean": 3.0}
    assert kept.summary["status"] == "finished"


def test_runs_of_one_process_stay_apart(server: Server, tmp_path: Path) -> None:
    for name in ("one", "other"):
        made.train(tmp_path / name, "online")
        assert_mirrors(tmp_path / name, server)
    assert len(server.runs) == 2


def test_an_exception_finishes_the_run(server: Server, tmp_path: Path) -> None:
    record = made.begin(Record(tmp_path / "run"))

    def crash() -> None:
        with TrainingMirror(record, made.options("online")):
            made.log(record, 1, 4)
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        crash()
    assert_mirrors(tmp_path / "run", server)
    assert [kept.exit_code for kept in server.runs.values()] == [1]


def test_disabled_leaves_no_trace(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "disabled")
    assert "wandb" not in read_run(tmp_path / "run")
    assert not (tmp_path / "run" / "wandb").exists()


def test_online_after_offline_sends_all_and_sets_the_offline_run_aside(server: Server, tmp_path: Path) -> None:
    made.train(tmp_path / "run", "offline", status="interrupted")
    made.train(tmp_path / "run", "online", first=4, after=9)
    assert_mirrors(tmp_path / "run", server)
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/*.wandb.synced"))) == 1


def test_offline_after_online_waits_for_sync(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made.train(tmp_path / "run", "online", status="interrupted")
    with caplog.at_level("INFO", "upcycle"):
        made.train(tmp_path / "run", "offline", first=4, after=9)
    assert "upcycle sync" in caplog.text
    assert not list(tmp_path.glob("run/wandb/offline-run-*"))
    assert read_run(tmp_path / "run")["wandb"]["rows"] == 0


def test_a_run_of_a_sweep_is_named_by_its_arm_and_seed(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its tags are cut to what W&B takes; the record has them whole."""
    arm = "layers=[0,1,2,3] schedule.peak=0.001 with a name that is longer than any tag may be"
    tags = ["mine", *sweep_tags("layers", arm)]
    record = made.begin(Record(tmp_path / "0f3a"), tags=tags)
    with TrainingMirror(record, made.options("offline")):
        record.describe(status="finished")
    records = made.inspect(next(tmp_path.glob("0f3a/wandb/offline-run-*/*.wandb")))
    (run,) = [each["run"] for each in records if each["type"] == "run"]
    assert run["display_name"] == f"{arm}, seed 0"
    assert run["tags"] == ["mine", "sweep:layers", f"arm:{arm}"[:64]]
    assert read_run(tmp_path / "0f3a")["config"]["wandb"]["tags"] == tags


def test_the_manifest_arrives_without_its_tensors(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A large model has thousands of them; where it came from is what counts."""
    record = made.begin(Record(tmp_path / "run"))
    record.describe(manifest={"source": {"sha256": {"model.safetensors": "a"}}, "tensors": {"lm_head.weight": []}})
    with TrainingMirror(record, made.options("offline")):
        record.describe(status="finished")
    records = made.inspect(next(tmp_path.glob("run/wandb/offline-run-*/*.wandb")))
    (run,) = [each["run"] for each in records if each["type"] == "run"]
    assert run["config"]["update"]["manifest"] == {"source": {"sha256": {"model.safetensors": "a"}}}
    assert read_run(tmp_path / "run")["manifest"]["tensors"]


def train_with_artifacts(directory: Path, mode: str) -> None:
    source = directory / "moe"
    source.mkdir()
    (source / "equivalence.json").write_text("{}")
    record = made.begin(Record(directory / "run"), artifacts=True)
    record.describe(config=read_run(directory / "run")["config"] | {"source": str(source)})
    (directory / "run" / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    with TrainingMirror(record, made.options(mode, artifacts=True)):
        record.describe(status="finished")


def test_artifacts_offline(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train_with_artifacts(tmp_path, "offline")
    records = made.inspect(next(tmp_path.glob("run/wandb/offline-run-*/*.wandb")))
    sent = {each["type"]: each for each in records if each["type"] == "artifact"}
    assert sent


def test_artifacts_online(server: Server, tmp_path: Path) -> None:
    """Every file of both arrives as it is, with its digest, before the run is finished."""
    train_with_artifacts(tmp_path, "online")
    ((run, kept),) = server.runs.items()
    assert (kept.exit_code, kept.summary["status"]) == (0, "finished")
    assert {each.kind: each.files for each in server.artifacts.values()} == {
        "checkpoint": {"last.ckpt": b"weights"},
        "equivalence": {"equivalence.json": b"{}"},
    }
    for each in server.artifacts.values():
        assert (each.run, each.committed) == (run, True)
        ((name, described),) = each.manifest["contents"].items()
        digest = base64.b64encode(hashlib.md5(each.files[name], usedforsecurity=False).digest()).decode()
        assert (described["size"], described["digest"]) == (len(each.files[name]), digest)


def test_shards_of_a_checkpoint_arrive(server: Server, tmp_path: Path) -> None:
    """The checkpoint of several ranks: a name for a directory of shards, which are not sent twice."""
    record = made.begin(Record(tmp_path / "run"), artifacts=True)
    shards = tmp_path / "run" / "checkpoints" / "last.ckpt.8"
    shards.mkdir()
    for name in ("__0_0.distcp", "rest.ckpt"):
        (shards / name).write_bytes(name.encode())
    shards.with_name("last.ckpt").symlink_to(shards.name)
    with TrainingMirror(record, made.options("online", artifacts=True)):
        record.describe(status="finished")
    (sent,) = server.artifacts.values()
    assert sent.committed
    assert sorted(sent.manifest["contents"]) == ["last.ckpt/__0_0.distcp", "last.ckpt/rest.ckpt"]
    assert sorted(sent.files.values()) == [b"__0_0.distcp", b"rest.ckpt"]


def test_a_run_without_a_source_has_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all that of another model, in the working directory."""
    (tmp_path / "equivalence.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    record = made.begin(Record(tmp_path / "run"), artifacts=True)
    assert wandb_mirror.artifacts(record.directory, read_run(record.directory)) == {}


def test_a_list_that_is_too_long_for_a_histogram_stays_one() -> None:
    assert wandb_mirror._histogram([0.0] * 513) == [0.0] * 513
