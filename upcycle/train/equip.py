"""What a model is given before its first step, and what its budget comes to; needs shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.kernels.select import install_kernel
from upcycle.precision.install import compute_dtype, install_precision
from upcycle.routing.install import install_routers
from upcycle.routing.release import joint
from upcycle.train.device import device_of
from upcycle.train.flops import TRAINING_PASSES, ahead_flops, forward_flops
from upcycle.train.schedule import budget_steps, check_schedule

if TYPE_CHECKING:
    from upcycle.precision.linear import Emulation
    from upcycle.routing.install import Routing
    from upcycle.train.config import TrainConfig
    from upcycle.train.start import Start


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """Kernel, routers and budget of a run.

    Attributes:
        kernel: name of the expert kernel; None for a dense model.
        routing: its routers; None for a dense model.
        emulation: of low precision; None without a recipe of it.
        steps: optimizer steps of the budget.
        tokens_per_step: of one of them.
        flops_per_step: training FLOPs of one of them.
    """

    kernel: str | None
    routing: Routing | None
    emulation: Emulation | None
    steps: int
    tokens_per_step: int
    flops_per_step: int


def equip(start: Start, config: TrainConfig) -> Equipment:
    """Install kernel and routers in a model, which may be on the meta device, and count its budget.

    Raises:
        UpcycleError: the kernel or the routing does not fit the model, or the budget or schedule is not valid.
    """
    kernel, routing = None, None
    dtype = compute_dtype(config.precision, config.quantise)
    emulation = install_precision(start.model, start.moe, config.precision, config.quantise, seed=config.seed)
    if start.moe:
        kernel = install_kernel(start.model, config.kernel, device=device_of(config), dtype=dtype).name
        random = config.model == "scratch"
        options, depths = (config.router, config.balance), config.mtp.depths
        routing = install_routers(start.model, start.moe, *options, random=random, depths=depths)
    tokens_per_step = config.batch.sequences * config.sequence_length
    length = config.sequence_length
    forward = forward_flops(start.model, start.moe, sequence_length=length)
    per_token = TRAINING_PASSES * (forward + ahead_flops(start.model, sequence_length=length, depths=config.mtp.depths))
    flops_per_step = per_token * tokens_per_step
    steps = budget_steps(config.budget, tokens_per_step=tokens_per_step, flops_per_step=flops_per_step)
    check_schedule(config.schedule, steps=steps)
    if routing and config.router.release:
        routing.joint = joint(config.router.release, steps=steps)
    return Equipment(
        kernel=kernel,
        routing=routing,
        emulation=emulation,
        steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops_per_step,
    )
