"""Checkpoints are shards of any layout: another one goes on with them, and they are exported."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import training
from conversions import load
from launching import on_ranks
from pydantic import TypeAdapter
from test_parity import COMMON, TYPES, assert_same

from upcycle.errors import ConfigError, SourceError
from upcycle.train.checkpoints import exported_checkpoint, read_checkpoint
from upcycle.train.config import ExportConfig, TrainConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
STEPS = 5
SPREAD = ("parallel=ep", "parallel.ep=2")  # over four ranks
# Without what is of a micro-batch: where the ranks change and its size does not, so does their number.
MICRO = ("batch.micro=1", "balance.aux_loss=0", "checkpoint_every=3")


def options(source: Path, text: Path, output: Path, *changes: str, kind: str = "qwen2_moe") -> dict[str, Any]:
    """Five steps of one micro-batch, whatever the ranks, with a checkpoint after every second."""
    given = (*COMMON, *TYPES[kind], f"source='{source}'", "batch.micro=null", f"budget.steps={STEPS}")
    changes = ("checkpoint_every=2", "log_every=5", "resume=auto", *changes)
    return asdict(training.options(text, output, *given, *changes))


@pytest.fixture(scope="session")
def place(text_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that four ranks began and others ended, and what one process made of the same options, `NAME-alone`."""
    root = tmp_path_factory.mktemp("resharding")

    def run(name: str, *changes: str, kind: str = "qwen2_moe", **more: Any) -> dict[str, Any]:
        return {"do": "run", "options": options(text_model, text, root / name, *changes, kind=kind), **more}

    begun = [run(name, *SPREAD, stop_after=3) for name in ("fewer", "spread", "stopped")]
    begun.append(run("micro", *SPREAD, *MICRO, stop_after=4))
    begun.append(run("tensor", "parallel=tp_ep", kind="upcycled_moe", stop_after=3))
    on_ranks(4, [*begun, run("spread", "parallel=ep")], root)
    (root / "fewer/checkpoints/last.ckpt.1").mkdir()  # of a save that was cut off
    for name in ("cut", "dangling"):
        shutil.copytree(root / "stopped", root / name, symlinks=True)
    shard = root / "cut/checkpoints/last.ckpt.2/__3_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    shutil.rmtree(root / "dangling/checkpoints/last.ckpt.2")
    ended = [run("fewer", "parallel=ep"), run("micro", "parallel=ep", *MICRO)]
    ended.append(run("tensor", "parallel=ep", kind="upcycled_moe"))
    damaged = [run(name, "parallel=ep", refused=str(root / name)) for name in ("cut", "dangling")]
    on_ranks(2, [*ended, *damaged], root)
    for name, changes, kind in (("", (), "qwen2_moe"), ("micro-", MICRO, "qwen2_moe"), ("tensor-", (), "upcycled_moe")):
        config = options(text_model, text, root / f"{name}alone", *changes, kind=kind)
        training.run(TypeAdapter(TrainConfig).validate_python(config))
    return root


@pytest.mark.parametrize(
    ("name", "alone"),
    [("fewer", "alone"), ("spread", "alone"), ("micro", "micro-alone"), ("tensor", "tensor-alone")],
)
def test_another_layout_goes_on(name: str, alone: str, place: Path) -> None:
    """The row of the last step is about all five.

    Four ranks to two; experts over two ranks to over four; four ranks to two after an odd step, with twice as many
    micro-batches each; tensor parallelism to none, with the bias of aux-free balancing.
    """
    of_a_micro_batch = {"train/aux_loss"} if name == "micro" else set()
    assert_same(place / name, place / alone, but=of_a_micro_batch)


def test_the_bias_survives(place: Path, tmp_path: Path) -> None:
    biases = {
        name.removeprefix("model."): value
        for name, value in read_checkpoint(place / "tensor/checkpoints/last.ckpt")["state_dict"].items()
        if name.endswith("e_score_correction_bias")
    }
    assert len(biases) == 2
    assert all(value.count_nonzero() for value in biases.values())
    config = ExportConfig(
        run=str(place / "tensor"), output=str(tmp_path / "moe"), checkpoint="last", dtype="float32", overwrite=False
    )
    found = load(export(config)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in biases.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut", "the checkpoint is damaged\n  found:    {run}/checkpoints/last.ckpt: rank "),
        (
            "dangling",
            "the checkpoint is gone\n  found:    {run}/checkpoints/last.ckpt, a link to last.ckpt.2, which is ",
        ),
    ],
)
def test_damaged_shards(name: str, expected: str, place: Path) -> None:
    before = training.rows(place / "stopped")
    for rank in (0, 1):
        assert (place / f"{name}.{rank}").read_text().startswith(expected.format(run=place / name))
    if name == "dangling":  # the rows are still there
        assert training.rows(place / name) == before
    with pytest.raises(SourceError, match="the checkpoint is (damaged|gone)"):
        exported_checkpoint(place / name / "checkpoints/last.ckpt")


def test_exported(place: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        run=str(place / "fewer"),
        output=str(tmp_path / "moe"),
        checkpoint="last",
        dtype="float32",
        portable=False,
        overwrite=False,
    )
    found = load(export(config)).state_dict()
    trained = read_checkpoint(place / "fewer/checkpoints/last.ckpt")["state_dict"]
    assert {f"model.{name}" for name in found} == set(trained)
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in found.items())


def test_only_the_last_checkpoints_are_kept(place: Path) -> None:
    for run in ("spread", "fewer"):
        names = [each.name for each in (place / run / "checkpoints").iterdir()]
        assert {"last.ckpt", "last.ckpt.5", "best.ckpt"} <= set(names)
        assert len(names) == 4  # and the best one's shards


def test_one_process_cannot_go_on_with_shards(place: Path, text_model: Path, text: Path) -> None:
    alone = TypeAdapter(TrainConfig).validate_python(options(text_model, text, place / "stopped"))
    with pytest.raises(ConfigError, match="started by several processes, and one is to go on"):
        training.run(alone)
