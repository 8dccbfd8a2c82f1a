"""Puts routers into a model and holds them together. Knows this room, and what a MoE is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from upcycle.errors import ConfigError
from upcycle.routing.balance import bias_step, load_balancing_loss, sum_over_ranks
from upcycle.routing.check import check_routing
from upcycle.routing.config import coefficient
from upcycle.routing.router import Forward, Router
from upcycle.routing.selection import native_selection, selection_changes
from upcycle.routing.statistics import RoutingSums, no_sums, stack

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from upcycle.moe_config import MoeDescription
    from upcycle.routing.config import BalanceConfig, RouterConfig


class Losses(NamedTuple):
    """Balancing losses of one forward, means over layers.

    Attributes:
        total: what to add to the model's loss: the others times their coefficients, 0 if all of these are.
        aux: Switch's load-balancing loss, without its coefficient.
        z: the router's z-loss, without its coefficient.
    """

    total: Tensor
    aux: Tensor
    z: Tensor


class Routing:
    """All routers of a model, and how they are balanced. Has no parameters of its own.

    Only forwards in training mode count.

    Attributes:
        routers: by layer index.
        balance: the options.
    """

    def __init__(self, routers: dict[int, Router], balance: BalanceConfig) -> None:
        self.routers = routers
        self.balance = balance

    @property
    def measuring(self) -> bool:
        """Whether forwards add to `statistics`; they do unless it is set to False."""
        return all(router.measuring for router in self.routers.values())

    @measuring.setter
    def measuring(self, value: bool) -> None:
        for router in self.routers.values():
            router.measuring = value

    def losses(self, step: int) -> Losses:
        """Return the balancing losses of the last forward.

        One whose coefficient is 0 at `step` carries no gradient. With balance.statistics=global_batch every process
        has to call this.

        Args:
            step: optimizer steps made so far.

        Raises:
            RuntimeError: no forward in training mode since the last optimizer step.
        """
        forwards = [self._forwarded(layer) for layer in self.routers]
        if self.balance.statistics == "global_batch":
            load_LN = sum_over_ranks(self._step_load())
        else:
            load_LN = torch.stack([forward.load_N for forward in forwards])
        probability_LN = torch.stack([forward.probability_N for forward in forwards])
        aux = load_balancing_loss(probability_LN, load_LN)
        z = torch.stack([forward.z_loss for forward in forwards]).mean()
        weighted = [(self._coefficient("aux_loss", step), aux), (self._coefficient("z_loss", step), z)]
        terms = [weight * loss for weight, loss in weighted if weight]
        total = torch.stack(terms).sum() if terms else torch.zeros_like(aux)
        aux, z = (loss if weight else loss.detach() for weight, loss in weighted)
        return Losses(total=total, aux=aux, z=z)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """After optimizer step `step` (from 0): move the biases, and forget the loads of this step.

        With balance.bias_update every process has to call this; all then have the same biases.
        """
        if self.balance.bias_update != 0:
            directions_LN = bias_step(sum_over_ranks(self._step_load()))
            for router, direction_N in zip(self.routers.values(), directions_LN, strict=True):
                assert router.e_score_correction_bias is not None
                router.e_score_correction_bias += self._coefficient("bias_update", step) * direction_N
        for router in self.routers.values():
            router.forwarded = router.step_load_N = None

    def statistics(self) -> RoutingSums:
        """Return the sums since `reset_statistics`, on this rank, in the order of `routers`, with a dimension L."""
        layers = []
        for router in self.routers.values():
            none = no_sums(len(router.weight), router.weight.device)
            layers.append(none if router.sums is None else router.sums)
        return stack(layers)

    def reset_statistics(self) -> None:
        """Start the sums of `statistics` again."""
        for router in self.routers.values():
            router.sums = None

    def _forwarded(self, layer: int) -> Forward:
        forward = self.routers[layer].forwarded
        if forward is None:
            raise RuntimeError(f"the router of layer {layer} saw no forward in training mode since the last step")
        return forward

    def _step_load(self) -> Tensor:
        loads = []
        for router in self.routers.values():
            none = torch.zeros(len(router.weight), dtype=torch.int64, device=router.weight.device)
            loads.append(none if router.step_load_N is None else router.step_load_N)
        return torch.stack(loads)

    def _coefficient(self, name: str, step: int) -> float:
        return coefficient(getattr(self.balance, name), step)


def install_routers(
    model: PreTrainedModel, moe: MoeDescription, router: RouterConfig, balance: BalanceConfig
) -> Routing:
    """Replace the routers of `model` in place; the parameters and their names stay.

    transformers' own load-balancing loss is switched off (`config.output_router_logits`): it does not know these
    routers, and would count twice.

    Raises:
        ConfigError: options that cannot work, alone, together or with this model.
    """
    check_routing(moe, router, balance)
    routers = {}
    for layer in moe.layers:
        path = moe.router_path(layer)
        routers[layer] = _replacement(model.get_submodule(path), moe, router, balance)
        model.set_submodule(path, routers[layer], strict=True)
    model.config.output_router_logits = False
    return Routing(routers, balance)


def _replacement(native: nn.Module, moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> Router:
    stored: Any = native.selection if moe.target.generic else native_selection(moe)
    bias_N = getattr(native, "e_score_correction_bias", None)
    if bias_N is not None and router.expert_choice:
        raise ConfigError(
            "the checkpoint chooses experts by score plus a bias, which experts that choose tokens do not have",
            found="router.expert_choice=true",
            remedy="set router.expert_choice=false",
        )
    weight = native.get_parameter("weight")
    if bias_N is None and balance.bias_update != 0:
        bias_N = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    selection = replace(stored, **selection_changes(moe, router))
    made = Router(native, selection, router, bias_N=bias_N, granularity=moe.granularity)
    return made.train(native.training)
