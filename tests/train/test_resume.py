"""An interrupted run ends as the uninterrupted one: weights, optimizer and record bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from ended import Ended

from upcycle.data.order import PositionSampler
from upcycle.errors import ConfigError, OutputError
from upcycle.train import fit

pytest_plugins = ("text_model",)

STEPS = 8
# Everything that has state: two micro-batches, noise, the bias of aux-free balancing, warm-up, held-out losses.
STATEFUL = (
    *training.SMALL_MOE,
    "model=upcycle",
    f"budget.steps={STEPS}",
    "router.jitter=0.1",
    "router.noisy_top_k=true",
    "balance.bias_update=0.01",
    "balance.statistics=global_batch",
    "schedule.warmup=2",
    "log_every=2",
    "checkpoint_every=3",
    "metrics=dense",
)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(text: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    training.run(training.options(text, output, *STATEFUL, f"source='{text_model}'"))
    return output


def assert_same(one: Path, other: Path) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert training.differing_tensors(training.checkpoint(one)[part], training.checkpoint(other)[part]) == []
    assert training.checkpoint(one)["lr_schedulers"] == training.checkpoint(other)["lr_schedulers"]
    assert training.rows(one) == training.rows(other)


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_sigterm_saves_and_resumes(text: Path, text_model: Path, whole: Path, tmp_path: Path, step: int) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config, [training.At(step, terminate)])
    assert training.checkpoint(tmp_path / "run")["global_step"] == step
    training.run(config)
    assert_same(tmp_path / "run", whole)


GROUPS = {
    "tied": ("moe.groups=tied",),
    "whole": ("moe.groups=whole",),
    "positions": ("moe.groups=positions",),
    "released to free": ("moe.groups=whole", "router.release={until: 0.5, then: free}"),
    "released to positions": ("moe.groups=tied", "target=upcycled_moe", "router.release={until: 0.5, then: positions}"),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_resume(text: Path, text_model: Path, tmp_path: Path, groups: str) -> None:
    """Before the joint of a release, in the step that measures it, and after it."""
    given = (*STATEFUL, f"source='{text_model}'", "target=upcycled_moe", "init.router_std=0.3", *GROUPS[groups])
    training.run(training.options(text, tmp_path / "whole", *given))
    config = training.options(text, tmp_path / "run", *given, "resume=auto")
    for step in (2, 3, 4) if "released" in groups else (3,):
        training.run(config, [training.At(step, terminate)])
    training.run(config)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_another_way_to_choose_is_refused_by_name(text: Path, text_model: Path, whole: Path) -> None:
    given = (*STATEFUL, f"source='{text_model}'", "resume=auto", "moe.groups=free")
    with pytest.raises(ConfigError, match=r"moe\.groups=free \(was auto\)"):
        training.run(training.options(text, whole, *given))


def test_a_crash_resumes_from_the_last_checkpoint(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        training.run(config, [training.At(5, training.fail)])
    assert training.checkpoint(tmp_path / "run")["global_step"] == 3
    training.run(config)
    assert_same(tmp_path / "run", whole)


def test_a_checkpoint_from_before_whole_ffns_were_counted_goes_on(
    text: Path, text_model: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and losses are the uninterrupted run's; what routers did is said of the steps that follow."""
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config, [training.At(3, terminate)])
    file = tmp_path / "run/checkpoints/last.ckpt"
    earlier = torch.load(file, weights_only=True)
    for sums in earlier["routing"].values():
        del sums["whole"]
    del earlier["callbacks"]["TrainingMetrics"]["watching"]
    torch.save(earlier, file)
    training.run(config)
    assert "the moe metrics of the next row are of the steps from here on" in caplog.text
    for part in ("state_dict", "optimizer_states"):
        assert (
            training.differing_tensors(training.checkpoint(tmp_path / "run")[part], training.checkpoint(whole)[part])
            == []
        )
    rows, uninterrupted = training.rows(tmp_path / "run"), training.rows(whole)
    differing = [
        (row["step"], name)
        for row, other in zip(rows, uninterrupted, strict=True)
        for name in other
        if row[name] != other[name]
    ]
    assert differing
    assert all(step == 4 and name.startswith("moe/") for step, name in differing)


def test_a_wrong_position_in_the_data_is_noticed(
    text: Path, text_model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a run that starts the data again when it is resumed."""
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config, [training.At(4, terminate)])
    monkeypatch.setattr(
        fit, "PositionSampler", lambda order, **options: PositionSampler(order, **{**options, "start": 0})
    )
    training.run(config)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


# Trains, says every step that it has done, and does the next one when it is told to.
IN_STEP = """
import sys
from pathlib import Path
import training
from lightning.pytorch import Callback

class InStep(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            print(trainer.global_step, flush=True)
            sys.stdin.readline()

text, output, *changes = sys.argv[1:]
training.run(training.options(Path(text), Path(output), *changes), [InStep()])
"""


def kill_after(step: int, text: Path, output: Path, *changes: str) -> int:
    """Train, and kill with SIGKILL at an arbitrary moment of the step that follows; the last step that was done."""
    line = [sys.executable, "-c", IN_STEP, str(text), str(output), *changes]
    paths = [str(Path(training.__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # One thread, as in this process: sums depend on it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with Ended(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while int(process.stdout.readline()) < step:
            print(file=process.stdin, flush=True)
        print(file=process.stdin, flush=True)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        reached = max([step, *map(int, process.stdout)])
    assert process.returncode == -signal.SIGKILL
    return reached


def test_sigkill(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    """Killed at an arbitrary moment, and again: what was logged is on the disk, and the run goes on with it."""
    output = tmp_path / "run"
    given = [*STATEFUL, f"source='{text_model}'", "resume=auto"]
    for step in (5, 7):
        reached = kill_after(step, text, output, *given)
        assert json.loads((output / "run.json").read_text())["status"] == "running"
        last = training.rows(output)[-1]["step"]
        assert abs(reached - last) <= 1  # of log_every=2: at most the last step was not to be logged
    training.run(training.options(text, output, *given))
    assert_same(output, whole)


def test_a_finished_run_has_nothing_left(text: Path, text_model: Path, whole: Path) -> None:
    before = training.checkpoint(whole)
    config = training.options(text, whole, *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config)
    assert training.differing_tensors(before, training.checkpoint(whole)) == []


def test_an_output_that_exists_is_refused(text: Path, text_model: Path, whole: Path) -> None:
    with pytest.raises(OutputError, match="resume=auto"):
        training.run(training.options(text, whole, *STATEFUL, f"source='{text_model}'"))


def test_other_options_are_refused_by_name(text: Path, text_model: Path, whole: Path) -> None:
    config = training.options(text, whole, *STATEFUL, f"source='{text_model}'", "resume=auto")
    other = replace(config, seed=1, optim=replace(config.optim, clip=2.0))
    with pytest.raises(ConfigError, match=r"optim\.clip=2\.0 \(was 1\.0\), seed=1 \(was 0\)"):
        training.run(other)


def test_overwrite_starts_again(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "overwrite=true")
    training.run(config, [training.At(3, terminate)])
    training.run(config)
    assert_same(tmp_path / "run", whole)


def test_checkpoints_hold_no_code(whole: Path) -> None:
    assert torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] <= STEPS
