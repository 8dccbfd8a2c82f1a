"""Puts routers into a model and holds them together. Knows this room, and what a MoE is."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from upcycle.errors import ConfigError
from upcycle.routing.balance import bias_step, load_balancing_loss, sum_over_ranks
from upcycle.routing.check import check_routing
from upcycle.routing.config import coefficient
from upcycle.routing.release import Joint, rescale
from upcycle.routing.router import Forward, Router, together
from upcycle.routing.selection import native_selection, selection_changes
from upcycle.routing.statistics import RoutingSums, no_sums, stack
from upcycle.routing.ties import is_tied

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from upcycle.models.moe import MoeDescription
    from upcycle.routing.config import BalanceConfig, RouterConfig

_log = logging.getLogger("upcycle")


class Losses(NamedTuple):
    """Balancing losses of one forward, means over layers.

    Attributes:
        total: what to add to the model's loss: the others times their coefficients, 0 if all of these are. A layer for
            multi-token prediction weighs as much as one of the model's.
        aux: Switch's load-balancing loss, without its coefficient.
        z: the router's z-loss, without its coefficient.
        ahead: the last two of the layers for multi-token prediction; None where there are none.
    """

    total: Tensor
    aux: Tensor
    z: Tensor
    ahead: tuple[Tensor, Tensor] | None


class Routing:
    """All routers of a model, and how they are balanced. Has no parameters of its own.

    Only forwards in training mode count.

    Attributes:
        routers: by layer index, those of a block for multi-token prediction after the model's own.
        balance: the options.
        joint: when experts will be chosen in another way, and how; None never.
    """

    def __init__(
        self,
        routers: dict[int, Router],
        balance: BalanceConfig,
        experts: dict[int, nn.Module] | None = None,
        *,
        beyond: int = 0,
    ) -> None:
        self.routers = routers
        self._own = len(routers) - beyond
        self.balance = balance
        self.joint: Joint | None = None
        self._experts = experts or {}

    def begin(self, done: int) -> None:
        """Choose experts as a run does after `done` optimizer steps."""
        if self.joint:
            self.joint.before(list(self.routers.values()), done)

    @property
    def measuring(self) -> bool:
        """Whether forwards add to `statistics`; they do unless it is set to False."""
        return all(router.measuring for router in self.routers.values())

    @measuring.setter
    def measuring(self, value: bool) -> None:
        for router in self.routers.values():
            router.measuring = value

    def count_only(self, mask: Tensor | None) -> None:
        """Let balancing and statistics be about the tokens of the next forward that are no padding.

        Args:
            mask: its attention mask [B, L]; None counts all tokens.
        """
        counted_T = None if mask is None else mask.flatten().bool()
        for router in self.routers.values():
            router.counted_T = counted_T

    def released(self, done: int) -> bool:
        """Whether groups need no longer hold after `done` optimizer steps."""
        return self.joint is not None and self.joint.over(done)

    def losses(self, step: int) -> Losses:
        """Return the balancing losses of the last forward.

        One whose coefficient is 0 at `step` carries no gradient. With balance.statistics=global_batch every process
        has to call this.

        Args:
            step: optimizer steps made so far.

        Raises:
            RuntimeError: no forward in training mode since the last optimizer step.
        """
        forwards = [together(self._forwarded(layer)) for layer in self.routers]
        if self.balance.statistics == "global_batch":
            load_LN = sum_over_ranks(self._step_load())
        else:
            load_LN = torch.stack([forward.load_N for forward in forwards])
        probability_LN = torch.stack([forward.probability_N for forward in forwards])
        z_L = torch.stack([forward.z_loss for forward in forwards])
        own, beyond = slice(self._own), slice(self._own, None)
        parts = [own, beyond] if len(forwards) > self._own else [own]
        aux = [load_balancing_loss(probability_LN[part], load_LN[part]) for part in parts]
        z = [z_L[part].mean() for part in parts]
        weighted = [(self._coefficient("aux_loss", step), aux), (self._coefficient("z_loss", step), z)]
        shares = (1.0, (len(forwards) - self._own) / self._own)
        terms = [w * s * loss for w, losses in weighted if w for s, loss in zip(shares, losses, strict=False)]
        total = torch.stack(terms).sum() if terms else torch.zeros_like(aux[0])
        aux, z = ([loss if weight else loss.detach() for loss in losses] for weight, losses in weighted)
        return Losses(total=total, aux=aux[0], z=z[0], ahead=(aux[1], z[1]) if len(parts) > 1 else None)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """After optimizer step `step` (from 0): tie rows, move biases, release groups, forget the loads of this step.

        Every process has to call this; all then have the same biases.
        """
        for router in self.routers.values():
            router.tie()
        if self.balance.bias_update != 0:
            directions_LN = bias_step(sum_over_ranks(self._step_load()), together=self._together())
            for router, direction_N in zip(self.routers.values(), directions_LN, strict=True):
                assert router.e_score_correction_bias is not None
                router.e_score_correction_bias += self._coefficient("bias_update", step) * direction_N
        if self.joint and self.joint.step == step + 1:
            factors = [rescale(router, self._experts[layer]) for layer, router in self.routers.items()]
            shown = ", ".join(f"{factor:.4g}" for factor in factors)
            _log.info("from step %d on experts are chosen by %s; layers rescaled by %s", step, self.joint.then, shown)
        self.begin(step + 1)
        for router in self.routers.values():
            router.forwarded, router.step_load_N = (), None

    def _together(self) -> int:
        """How many experts' biases move as one: those of a virtual group while groups are chosen as wholes."""
        selection = next(iter(self.routers.values())).selection
        whole = selection.groups in ("tied", "whole") and self.balance.bias_per == "group"
        return selection.granularity if whole else 1

    def statistics(self) -> RoutingSums:
        """Return the sums since `reset_statistics`, on this rank, in the order of `routers`, with a dimension L.

        Those of a block for multi-token prediction are left out.
        """
        return self._stacked(slice(self._own))

    def ahead_statistics(self) -> RoutingSums | None:
        """The same of a block for multi-token prediction; None where there is none, or one without experts."""
        return self._stacked(slice(self._own, None)) if len(self.routers) > self._own else None

    def _stacked(self, part: slice) -> RoutingSums:
        layers = []
        for router in list(self.routers.values())[part]:
            none = no_sums(len(router.weight), router.weight.device)
            layers.append(none if router.sums is None else router.sums)
        return stack(layers)

    def reset_statistics(self) -> None:
        """Start the sums of `statistics` again."""
        for router in self.routers.values():
            router.sums = None

    def _forwarded(self, layer: int) -> tuple[Forward, ...]:
        forwards = self.routers[layer].forwarded
        if not forwards:
            raise RuntimeError(f"the router of layer {layer} saw no forward in training mode since the last step")
        return forwards

    def _step_load(self) -> Tensor:
        loads = []
        for router in self.routers.values():
            none = torch.zeros(len(router.weight), dtype=torch.int64, device=router.weight.device)
            loads.append(none if router.step_load_N is None else router.step_load_N)
        return torch.stack(loads)

    def _coefficient(self, name: str, step: int) -> float:
        return coefficient(getattr(self.balance, name), step)


def install_routers(
    model: PreTrainedModel,
    moe: MoeDescription,
    router: RouterConfig,
    balance: BalanceConfig,
    *,
    random: bool = False,
    depths: int = 1,
) -> Routing:
    """Replace the routers of `model` in place; the parameters and their names stay.

    transformers' own load-balancing loss is switched off (`config.output_router_logits`): it does not know these
    routers, and would count twice.

    Args:
        model: the model, which may be on the meta device.
        moe: its shape.
        router: options of routing.
        balance: options of its balancing.
        random: whether its weights are random: then rows that are to be tied are made equal, not looked at.
        depths: how often a forward pass applies a block for multi-token prediction.

    Raises:
        ConfigError: options that cannot work, alone, together or with this model; rows of a group that differ under
            moe.groups=tied.
    """
    check_routing(moe, router, balance)
    routers, experts = {}, {}
    for layer in (*moe.layers, *moe.ahead_layers):
        path, passes = moe.router_path(layer), depths if layer in moe.ahead_layers else 1
        routers[layer] = _replacement(model.get_submodule(path), moe, router, balance, passes=passes)
        model.set_submodule(path, routers[layer], strict=True)
        experts[layer] = model.get_submodule(moe.experts_path(layer))
    model.config.output_router_logits = False
    for layer, made in routers.items():
        if made.tied and made.weight.device.type != "meta":
            _tie(made, _name(moe, layer), random=random)
    return Routing(routers, balance, experts, beyond=len(moe.ahead_layers))


def _name(moe: MoeDescription, layer: int) -> str:
    """A layer in words."""
    if layer in moe.ahead_layers:
        return f"layer {moe.ahead_place(layer)} of the block for multi-token prediction"
    return f"layer {layer}"


def _tie(router: Router, layer: str, *, random: bool) -> None:
    if random:
        router.tie()
        return
    bias_N = router.e_score_correction_bias
    if bias_N is not None and not is_tied(bias_N[:, None], router.selection.granularity):
        raise ConfigError(
            "moe.groups=tied needs a correction bias that is equal within a virtual group",
            found=f"biases of {layer} that differ: with them, plain top-k takes groups apart",
            remedy="set moe.groups=free to go on as before, or convert the dense model anew",
        )
    if not is_tied(router.weight, router.selection.granularity):
        raise ConfigError(
            "moe.groups=tied needs router rows that are equal within a virtual group",
            found=f"rows of {layer} that differ, as training with moe.groups=free makes them",
            remedy="set moe.groups=free to go on as before, or convert the dense model anew",
        )


def _replacement(
    native: nn.Module, moe: MoeDescription, router: RouterConfig, balance: BalanceConfig, *, passes: int
) -> Router:
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
    made = Router(native, selection, router, bias_N=bias_N, indices_first=moe.indices_first, passes=passes)
    return made.train(native.training)
