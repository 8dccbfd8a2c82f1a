"""What a user sees of a run: the panel at its start, the progress bar, the summary at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar
from rich.panel import Panel
from rich.table import Table

from upcycle.plan.groups import IN_TRAINING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from upcycle.train.prepared import Run

SHOWN = {
    "train/loss": "loss",
    "val/loss": "held out",
    "train/mse": "squared error",
    "val/mse": "held out",
    "train/tokens_per_second": "tokens/s",
}
REGRESSION = ("train/mse", "val/mse")
ROUTING = ("moe/max_vio", "moe/dead_experts", "moe/whole_ffns")
SUMMARY = ("train/loss", "val/loss", "val/perplexity", *REGRESSION, "train/tokens", "train/flops", *ROUTING)


class TrainingProgress(RichProgressBar):
    """Lightning's bar over the micro-batches of the whole budget, with the record's last values.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(leave=True)
        self._run = run

    @property
    def total_train_batches(self) -> int:
        return self._run.steps * self.trainer.accumulate_grad_batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        last = self._run.record.last
        return {short: f"{last[name]:.4g}" for name, short in SHOWN.items() if name in last}


def panel(run: Run) -> Panel:
    """What will run: model, MoE shape, kernel, parameters, budget, output."""
    config, start = run.config, run.start
    tokens = run.steps * config.batch.sequences * config.sequence_length
    parameters = sum(parameter.numel() for parameter in start.model.parameters())
    rows = {
        "model": f"{config.model}: {start.model.config.model_type}, {parameters / 1e6:,.2f} M parameters",
        **({"experts": f"{start.moe.name}, {start.moe.router_order}, kernel {run.kernel}"} if start.moe else {}),
        **({"groups": _groups(run)} if start.moe and start.moe.granularity > 1 else {}),
        "budget": f"{run.steps:,} steps, {tokens:,} tokens, {run.steps * run.flops_per_step:.3g} FLOPs",
        "batch": f"{config.batch.sequences} sequences of {config.sequence_length} tokens",
        "data": f"{config.data.name}: {run.corpus.tokens:,} tokens, {run.corpus.documents:,} documents",
        "schedule": f"{config.schedule.name}, peak {config.schedule.peak:g}",
        **({"ranks": _ranks(run)} if run.ranks.size > 1 else {}),
        "output": str(run.record.directory),
        **({"resumed": f"after step {run.resumed:,}"} if run.resumed else {}),
    }
    return Panel(_grid(rows), title="upcycle train", title_align="left")


def _groups(run: Run) -> str:
    start, release = run.start, run.config.router.release
    assert start.moe
    later = f"; {release.then} after {release.until:g} of the budget" if release else ""
    return f"{start.moe.groups}: {IN_TRAINING[start.moe.groups]}{later}"


def _ranks(run: Run) -> str:
    read = [share["bytes_read"] for share in run.shares if share["bytes_read"] is not None]
    held = max(share["peak_memory"] or 0 for share in run.shares)
    slices = f"each read up to {max(read) / 1e6:,.1f} MB of the source; " if read else ""
    return f"{run.ranks.size}: {run.ranks.layout}; {slices}at most {held / 1e9:,.2f} GB in memory"


def summary(run: Run) -> Panel:
    """The last value of what matters."""
    last = run.record.last
    rows = {name: f"{last[name]:,.6g}" for name in SUMMARY if name in last}
    return Panel(_grid({**rows, "run": str(run.record.directory)}), title="trained", title_align="left")


def _grid(rows: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid
