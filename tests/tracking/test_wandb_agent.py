"""A sweep driven by W&B's own agent: the runs that it asks for are those that the sweep itself would make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import wandb_records as made
from cli import Outcome
from omegaconf import OmegaConf

from upcycle.tracking.record import read_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from wandb_server import Server

    Upcycle = Callable[..., Outcome]

pytest_plugins = ("text_model", "tiny")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def given(text: Path, tmp_path: Path) -> list[str]:
    """The command line of a sweep of seconds."""
    return [
        "+sweeps=layers",
        "scale=smoke",
        f"source={ROOT / 'models/stdlib-250k'}",
        "data=text",
        f"data.files='{text}/*.txt'",
        "data.held_out=2",
        f"data.cache_dir='{text.parent}/cache'",
        "budget.flops=null",
        "budget.steps=2",
        f"output={tmp_path / 'runs'}",
    ]


def config(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def planned(upcycle: Upcycle, given: list[str], tmp_path: Path) -> Path:
    ended = upcycle("plan-sweep", *given, f"agent={tmp_path / 'sweep.yaml'}")
    assert ended.status == 0, ended
    assert f"next: wandb sweep {tmp_path / 'sweep.yaml'}" in ended.out
    return tmp_path / "sweep.yaml"


def client(*arguments: str, cwd: Path) -> Outcome:
    """W&B's command, with `upcycle` on the path as where it is installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "wandb", *arguments]
    ended = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    return Outcome(status=ended.returncode, out=ended.stdout, err=ended.stderr)


def test_what_w_and_b_is_told(upcycle: Upcycle, given: list[str], tmp_path: Path) -> None:
    told = config(planned(upcycle, given, tmp_path))
    assert told["method"] == "grid"
    assert told["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert told["parameters"] == {
        "seed": {"values": [0, 1]},
        "arm": {"values": ["baseline", "layers=every_2", "layers=[0]"]},
    }
    assert told["command"][:3] == ["${env}", "upcycle", "train"]
    assert told["command"][-1] == "${args_override_hydra}"
    assert not any(each.startswith("agent=") for each in told["command"])


def test_agents_need_to_know_where_runs_go(upcycle: Upcycle, given: list[str], tmp_path: Path) -> None:
    nowhere = [each for each in given if not each.startswith("output=")]
    upcycle("plan-sweep", *nowhere, f"agent={tmp_path / 'sweep.yaml'}").refused("a required option is missing")
    assert not (tmp_path / "sweep.yaml").exists()


def test_an_unknown_arm(upcycle: Upcycle, given: list[str], tmp_path: Path) -> None:
    refused = upcycle("train", *given, "+arm=layers=[1]", "seed=0")
    refused.refused("the sweep has no such arm", found="layers=[1]")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_agent_makes_the_runs_of_the_sweep(
    server: Server, upcycle: Upcycle, given: list[str], tmp_path: Path
) -> None:
    """An arm by W&B's agent, then the same by name: it has finished, where the sweep's plan puts it."""
    file = planned(upcycle, given, tmp_path)
    made_sweep = client("sweep", str(file), cwd=tmp_path)
    assert made_sweep.status == 0, made_sweep
    assert list(server.sweeps) == ["sweep0"]
    asked = {"arm": {"value": "layers=[0]"}, "seed": {"value": 1}}
    server.commands.append({"type": "run", "run_id": "asked", "program": "", "args": asked})
    ended = client("agent", "--count", "1", "lab/upcycle/sweep0", cwd=tmp_path)
    assert ended.status == 0, ended
    (run,) = (each.parent for each in (tmp_path / "runs").glob("*/run.json"))
    record = read_run(run)
    assert (record["status"], record["config"]["seed"]) == ("finished", 1), ended.err
    assert record["config"]["moe"]["layers"] == [0]
    assert (record["wandb"]["id"], record["wandb"]["project"]) == ("asked", "upcycle")
    assert made.shown(server.runs["asked"].history) == made.rows(run)
    assert server.runs["asked"].group == "layers"
    before = (run / "run.json").stat().st_mtime_ns
    again = upcycle("train", *given, "+arm=layers=[0]", "seed=1")
    assert again.status == 0, again
    assert "1 runs (1 arms, seeds 1), 1 finished" in again.err
    assert (run / "run.json").stat().st_mtime_ns == before
    assert "6 runs (3 arms, seeds 0, 1), 1 finished" in upcycle("plan-sweep", *given).out
