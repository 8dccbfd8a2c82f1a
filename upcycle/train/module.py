"""The Lightning module: one forward pass, its losses, and the optimizer. Knows no objective, only the door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from upcycle.distributed.gradients import clip_by_norm
from upcycle.distributed.ranks import ALONE
from upcycle.init.rng import derived_seed
from upcycle.train.finite import not_finite
from upcycle.train.objectives.objective import LOSS, model_inputs
from upcycle.train.optim import adamw
from upcycle.train.schedule import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.distributed.ranks import Ranks
    from upcycle.models.moe import MoeDescription
    from upcycle.precision.linear import Emulation
    from upcycle.routing.install import Routing
    from upcycle.train.config import TrainConfig
    from upcycle.train.objectives.objective import Batch, Objective


class TrainingModule(LightningModule):
    """Trains a model, dense or MoE.

    Everything random in a step depends on (seed, step, micro-batch) alone, so that a resumed run repeats it.

    Args:
        model: the model.
        moe: its shape; None for a dense model.
        routing: its routers; None for a dense model.
        emulation: of low precision; None without a recipe of it.
        objective: what is minimised.
        config: the options.
        steps: optimizer steps of the budget.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        moe: MoeDescription | None,
        routing: Routing | None,
        emulation: Emulation | None = None,
        objective: Objective,
        config: TrainConfig,
        steps: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.model = model
        if config.compile:
            model.compile()
        self.moe = moe
        self.routing = routing
        self.emulation = emulation
        self.config = config
        self.steps = steps
        self.ranks = ranks
        self.tokens_per_step = config.batch.sequences * config.sequence_length
        self.grad_norm: Tensor | None = None
        self.objective = objective

    def configure_model(self) -> None:
        """Nothing is left to do: with several ranks, the model was laid out as it was loaded."""

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule as a factor on every group's learning rate."""
        optimizer = adamw(self.model, self.moe, self.config.optim, peak=self.config.schedule.peak)
        schedule = LambdaLR(optimizer, lambda step: self.learning_rate(step) / self.config.schedule.peak)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config.schedule, step, steps=self.steps, tokens_per_step=self.tokens_per_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt what is of another number of ranks, or another layout, before Lightning restores it.

        Lightning steps when the micro-batches that were done are a multiple of `accumulate_grad_batches`; a scheduler
        has a rate for each group of parameters.
        """
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            count |= dict.fromkeys(count, done)
        for scheduler in checkpoint["lr_schedulers"]:
            del scheduler["base_lrs"], scheduler["_last_lr"]
            scheduler["lr_lambdas"] = []

    def on_train_start(self) -> None:
        """Choose experts as the run does at this step."""
        if self.routing:
            self.routing.begin(self.global_step)

    def on_train_batch_start(self, _batch: Batch, batch_idx: int) -> int | None:
        """Leave the loop when a signal asked for it; otherwise seed the micro-batch."""
        if self.trainer.should_stop:
            return -1
        micro_batch = f"{batch_idx}/{self.ranks.data_rank}"
        if self.emulation:
            self.emulation.micro_batch = micro_batch
        seed = derived_seed(self.config.seed, f"train/{micro_batch}")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats the whole stack where CUDA is not in use
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return None

    def training_step(self, batch: Batch, _batch_idx: int) -> dict[str, Tensor]:
        """Losses of one micro-batch; `loss` is the one that is minimised, the others are detached."""
        if self.routing:
            self.routing.count_only(batch.get("attention_mask"))
        parts = self.objective.loss(self.model, batch)
        loss = parts.pop(LOSS)
        if self.routing:
            balance = self.routing.losses(self.global_step)
            parts |= {"aux_loss": balance.aux, "z_loss": balance.z}
            if balance.ahead:
                parts |= dict(zip(("mtp_aux_loss", "mtp_z_loss"), balance.ahead, strict=True))
            loss = loss + balance.total
        if self.ranks.any(not torch.isfinite(loss), self.device):
            inputs, step = model_inputs(batch), self.global_step + 1
            raise not_finite(self.model, inputs, loss=float(loss.detach()), step=step, ranks=self.ranks)
        return {LOSS: loss, **{name: part.detach() for name, part in parts.items()}}

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by global norm, and keep the norm for the record."""
        limit = self.config.optim.clip
        self.grad_norm = clip_by_norm(self.model.parameters(), float("inf") if limit is None else limit)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the routers balance.

        Lightning would keep the gradients through the next forward pass, next to its activations.
        """
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        if self.routing:
            self.routing.end_step(step)
