"""The rows of the record: what a training run measures besides held-out losses.

Shapes: L MoE layers, N experts.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from upcycle.routing.statistics import RoutingSums
from upcycle.train.objectives.objective import LOSS
from upcycle.train.periodic import Periodic
from upcycle.train.similarity import dense_cosine, expert_matrices, group_cosine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from upcycle.distributed.ranks import Ranks
    from upcycle.models.moe import MoeDescription
    from upcycle.tracking.record import Record
    from upcycle.train.similarity import Matrices

Row = dict[str, Any]
TOKENS = "tokens"  # in the sums, where it is no mean over micro-batches
LOAD = "load"
WHOLE = 0.9  # share of tokens with whole FFNs below which a run has lost its start
_log = logging.getLogger("upcycle")


class TrainingMetrics(Callback):
    """Logs losses, learning rate, throughput and, for a MoE, routing, every so many optimizer steps.

    Args:
        record: where rows go.
        ranks: the processes that train together; a row is about all of them.
        apart: whose time does not count.
        every: optimizer steps between rows.
        flops_per_step: training FLOPs of an optimizer step.
        peak_flops: FLOP/s of a rank's device; None leaves MFU out.
        routing: whether to log routing statistics.
    """

    def __init__(
        self,
        record: Record,
        ranks: Ranks,
        apart: Sequence[Periodic],
        *,
        every: int,
        flops_per_step: int,
        peak_flops: float | None,
        routing: bool,
    ) -> None:
        self._record, self._ranks, self._apart, self._every = record, ranks, apart, every
        self._flops_per_step, self._peak_flops, self._routing = flops_per_step, peak_flops, routing
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._since: tuple[float, int] = (0.0, 0)
        self._watching = False

    def state_dict(self) -> dict[str, Any]:
        """The sums over all ranks, so that a run can go on with another number of them."""
        return {"sums": self._total(), "steps": self._steps, "watching": self._watching}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The ranks with the first samples take the sums of all."""
        self._steps, self._watching = state_dict["steps"], state_dict.get("watching", False)  # earlier ones lack it
        self._sums = {
            name: value if self._ranks.data_rank == 0 else torch.zeros_like(value)
            for name, value in state_dict["sums"].items()
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what routers counted since the last row: the next row covers it too."""
        if self._routing:
            routers = pl_module.routing.routers
            checkpoint["routing"] = {
                layer: asdict(self._over_ranks(router.sums)) for layer, router in routers.items() if router.sums
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with what routers counted; what an earlier version kept in another form is left out, and said."""
        if self._routing and self._ranks.data_rank == 0:
            counted = {field.name for field in fields(RoutingSums)}
            if any(sums.keys() != counted for sums in checkpoint["routing"].values()):
                _log.warning(
                    "the checkpoint is an earlier version's, which counted routing otherwise: the moe metrics of the "
                    "next row are of the steps from here on"
                )
                return
            for layer, sums in checkpoint["routing"].items():
                on_device = {name: value.to(pl_module.device) for name, value in sums.items()}
                pl_module.routing.routers[layer].sums = RoutingSums(**on_device)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Routers count only what is logged."""
        if pl_module.routing:
            pl_module.routing.measuring = self._routing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = {name: value.to(pl_module.device) for name, value in self._sums.items()}
        self._since = (self._clock(), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add to the sums; at the end of an interval, log a row."""
        micro_batches = trainer.accumulate_grad_batches * self._ranks.layout.data
        for name, value in outputs.items():
            if name != LOSS:
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() / micro_batches
        tokens = outputs[LOSS].new_tensor(pl_module.objective.tokens(batch), dtype=torch.float64)
        self._sums[TOKENS] = self._sums.get(TOKENS, 0.0) + tokens
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._steps += 1
            if trainer.global_step == 1 and self._routing:
                self._watching = whole_share(self._over_ranks(pl_module.routing.statistics())) > WHOLE
            if trainer.global_step % self._every == 0:
                row = self._row(trainer.global_step, pl_module)
                self._record.log(row, step=trainer.global_step)
                self._watch(row, trainer.global_step, pl_module)

    def _watch(self, row: Row, step: int, module: Any) -> None:
        """Say once that whole FFNs have become few in a run that started with them."""
        if not self._watching or row["moe/whole_ffns"] >= WHOLE:
            return
        self._watching = False
        if self._ranks.main and not module.routing.released(step):
            _log.warning(
                "step %d: %.0f %% of tokens have experts that make whole FFNs, and all had at the start: virtual "
                "groups have come apart, and with them what the dense model knew. Start again with moe.groups=tied, or "
                "with moe.groups=positions and target=upcycled_moe",
                step,
                100 * row["moe/whole_ffns"],
            )

    def _row(self, step: int, module: Any) -> Row:
        means = {name: float(total) / self._steps for name, total in self._total().items()}
        tokens = means.pop(TOKENS)
        before, steps = self._record.last.get("train/tokens", 0), self._steps
        self._sums, self._steps = {}, 0
        row: Row = {
            **module.objective.row(means),
            **{f"train/{name}": value for name, value in means.items()},
            "train/grad_norm": float(module.grad_norm),
            "train/learning_rate": module.learning_rate(step - 1),
            "train/tokens": before + round(tokens * steps),
            "train/flops": step * self._flops_per_step,
            **self._speed(step, tokens),
        }
        if self._routing:
            row |= routing_row(self._over_ranks(module.routing.statistics()), module.moe.layers)
            if ahead := module.routing.ahead_statistics():
                places = tuple(map(module.moe.ahead_place, module.moe.ahead_layers))
                row |= layer_rows(by_layer(self._over_ranks(ahead)), places, "mtp/layer_{layer}")
            module.routing.reset_statistics()
        return row

    def _total(self) -> dict[str, Tensor]:
        """The sums over all ranks, each of which has to call it."""
        return {name: self._ranks.sum(value) for name, value in self._sums.items()}

    def _over_ranks(self, sums: RoutingSums) -> RoutingSums:
        return RoutingSums(**{name: self._ranks.sum(value) for name, value in asdict(sums).items()})

    def _speed(self, step: int, tokens_per_step: float) -> Row:
        now, (before, first) = self._clock(), self._since
        self._since = (now, step)
        per_step = (now - before) / max(1, step - first)
        row: Row = {"train/step_seconds": per_step, "train/tokens_per_second": tokens_per_step / per_step}
        if self._peak_flops:
            row["train/mfu"] = self._flops_per_step / per_step / (self._peak_flops * self._ranks.size)
        return row

    def _clock(self) -> float:
        return time.perf_counter() - sum(each.seconds for each in self._apart)


def whole_share(sums: RoutingSums) -> float:
    """Share of tokens whose experts make whole FFNs, over all layers."""
    return float(sums.whole.sum() / sums.tokens.sum().clamp_min(1))


def routing_row(sums: RoutingSums, layers: tuple[int, ...]) -> Row:
    """Metrics of routing by layer, and their means.

    Args:
        sums: of all layers, each with a leading dimension L.
        layers: indices of the MoE layers.
    """
    measured = by_layer(sums)
    means = {
        f"moe/{name}": sum(values) if name == "dead_experts" else sum(values) / len(values)
        for name, values in measured.items()
        if name != LOAD
    }
    return means | layer_rows(measured, layers, "moe/layer_{layer}")


def layer_rows(measured: dict[str, list[Any]], layers: tuple[int, ...], place: str) -> Row:
    """What was measured of each layer, under a name for it with `{layer}` left open."""
    return {
        f"{place.format(layer=layer)}/{name}": value
        for name, values in measured.items()
        for layer, value in zip(layers, values, strict=True)
    }


def by_layer(sums: RoutingSums) -> dict[str, list[Any]]:
    """Metrics of routing, one value a layer; of the load, a list."""
    load_LN = sums.load.double()
    share_LN = load_LN / load_LN.sum(-1, keepdim=True).clamp_min(1)
    experts, tokens_L = load_LN.shape[-1], sums.tokens.double().clamp_min(1)
    measured = {
        "max_vio": share_LN.max(-1).values * experts - 1,
        "load_entropy": torch.special.entr(share_LN).sum(-1) / math.log(max(2, experts)),
        "dead_experts": (sums.load == 0).sum(-1),
        "dropped_share": sums.dropped / load_LN.sum(-1).clamp_min(1),
        "router_entropy": sums.entropy / tokens_L,
        "selected_mass": sums.mass / tokens_L,
        "whole_ffns": sums.whole / tokens_L,
        LOAD: share_LN,
    }
    return {name: values.tolist() for name, values in measured.items()}


class ExpertSimilarity(Periodic):
    """Logs how far experts have moved from the dense model and from each other.

    Args:
        record: where rows go.
        moe: the model's shape.
        shards: a layer's dense shards; None where the dense model is not there.
        every: optimizer steps.
    """

    def __init__(
        self, record: Record, moe: MoeDescription, shards: Callable[[int], Matrices] | None, *, every: int
    ) -> None:
        super().__init__(every=every)
        self._record, self._moe, self._shards = record, moe, shards

    def measure(self, step: int, module: Any, _trainer: Trainer) -> None:
        row: Row = {}
        groups, cosines = [], []
        for layer in self._moe.layers:
            experts = expert_matrices(module.model.get_submodule(self._moe.experts_path(layer)))
            across = group_cosine(experts, granularity=self._moe.granularity)
            if across is not None:
                row[f"moe/layer_{layer}/group_cosine"] = across
                groups.append(across)
            if self._shards:
                cosine_N = dense_cosine(experts, self._shards(layer))
                row[f"moe/layer_{layer}/dense_cosine"] = cosine_N.tolist()
                cosines.append(float(cosine_N.mean()))
        for name, values in (("group_cosine", groups), ("dense_cosine", cosines)):
            if values:
                row[f"moe/{name}"] = sum(values) / len(values)
        self._record.log(row, step=step)
