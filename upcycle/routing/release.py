"""From groups that hold to another way to choose, at one step of a run, without a jump in the experts' weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from upcycle.errors import ConfigError, TrainingError
from upcycle.routing.balance import sum_over_ranks
from upcycle.routing.ratios import ratio

if TYPE_CHECKING:
    from torch import nn

    from upcycle.routing.config import Release, RouterConfig
    from upcycle.routing.router import Router


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A release as steps.

    Attributes:
        step: optimizer steps before it.
        then: how experts are chosen after it.
    """

    step: int
    then: str

    def over(self, done: int) -> bool:
        """Whether it lies behind after `done` optimizer steps."""
        return done >= self.step

    def before(self, routers: list[Router], done: int) -> None:
        """Make routers choose as at a step of the run: after `done` optimizer steps.

        In the last step before the joint they measure what the experts' weights would be after it.
        """
        for router in routers:
            after = replace(router.selection, groups=self.then)
            if self.over(done):
                router.selection = after
            router.ahead = after if done == self.step - 1 else None
            router.masses = None


def joint(release: Release, *, steps: int) -> Joint:
    """The step of a release in a run of `steps`; at least one step comes before it and one after.

    Raises:
        ConfigError: the run is too short for that.
    """
    if steps < 2:
        raise ConfigError("router.release needs a step before it and one after", found=f"{steps} steps")
    return Joint(step=min(max(1, round(release.until * steps)), steps - 1), then=release.then)


def groups_at(router: RouterConfig, *, step: int, steps: int) -> str | None:
    """How experts are chosen after `step` of `steps` optimizer steps, where a release has said it; otherwise None."""
    if router.release is None:
        return None
    at = joint(router.release, steps=steps)
    return at.then if at.over(step) else None


@torch.no_grad()
def rescale(router: Router, experts: nn.Module) -> float:
    """Multiply a layer's experts by what the sum of their weights falls or rises by at the joint.

    Measured over the tokens of the last step before it, on all ranks, which all have to call it. The down projection
    takes the factor: an expert is linear in it.

    Returns:
        The factor: the mean sum of the weights before over the mean after; 1 where the experts have no weight before.

    Raises:
        TrainingError: they have none after.
    """
    assert router.masses is not None
    before, after = sum_over_ranks(router.masses).tolist()
    factor = ratio(before, after) if before else 1.0
    if factor is None:
        raise TrainingError(
            "the experts have no weight once their groups are let go",
            found=f"{before:.3g} over all tokens before, {after:.3g} after",
            remedy="set router.release=null",
        )
    downs = [parameter for name, parameter in experts.named_parameters() if name.startswith("down_proj")]
    assert downs
    for parameter in downs:
        parameter.mul_(factor)
    return factor
