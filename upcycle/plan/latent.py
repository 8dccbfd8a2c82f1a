"""Routed experts in fewer dimensions, y = fc2(sum p_i E_i(fc1 x)) + shared(x): LatentMoE, arXiv 2601.18089.

A latent size below the hidden size starts in one of two ways. `exact`: the shared expert is the dense FFN and fc2 is 0.
`compress`: fc1 keeps the directions of the inputs that the FFN's matrices make most of, fc2 those in which its outputs
are largest, and experts are shards of the FFN between them; which is not lossless, so that its error is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from upcycle.arch.moe import LatentStart
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from upcycle.options.config import InitConfig, MoeConfig

LATENT_STARTS: tuple[LatentStart, ...] = get_args(LatentStart)
# A covariance of H directions from fewer tokens per direction says little about other text.
TOKENS_PER_DIRECTION = 4


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What was computed for the projections of a conversion; empty where nothing was, or not yet.

    Attributes:
        sha256: of each matrix that parts name (`basis_name`).
        neurons: of a layer's FFN, all, the shared expert's first; no layers where neurons stay in their order.
        errors: of each layer, relative root mean square error of the FFN's output on text that nothing was fit on.
    """

    sha256: Mapping[str, str] = field(default_factory=dict)
    neurons: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)


def basis_name(layer: int, basis: str) -> str:
    """What parts call a computed matrix: encode [L, H] is fc1, decode [H, L] its way back, output [H, L] is fc2."""
    return f"layer.{layer}.latent.{basis}"


def latent_start(latent: int | None, init: InitConfig, hidden_size: int) -> LatentStart | None:
    """How projections start that are not identities; None where there are none."""
    if latent is None or latent == hidden_size:
        return None
    return "compress" if init.latent == "compress" else "exact"


def calibrates(latent: int | None, init: InitConfig, hidden_size: int) -> bool:
    """Whether the projections are measured on text, rather than drawn."""
    start = latent_start(latent, init, hidden_size)
    return init.name != "random" and (start == "compress" or (start == "exact" and init.scaling == "calibrated"))


def check_latent(moe: MoeConfig, init: InitConfig, hidden_size: int) -> None:
    """Check `moe.latent` and `init.latent` with what they go with.

    Raises:
        ConfigError: a size that is none, or a start that does not go with the shared expert or the initialization.
    """
    if moe.latent is None:
        if init.latent == "compress":
            raise ConfigError(
                "init.latent=compress is for a moe.latent below the hidden size",
                found="moe.latent=null",
                remedy=f"set moe.latent={max(1, hidden_size // 2)}, or leave init.latent out",
            )
        return
    if not 1 <= moe.latent <= hidden_size:
        expected = f"1 to {hidden_size}, the hidden size"
        raise ConfigError("moe.latent is out of range", found=moe.latent, expected=expected)
    start, shared = latent_start(moe.latent, init, hidden_size), _shared(moe)
    if start == "compress" and init.name == "random":
        raise ConfigError(
            "init.latent=compress keeps what init=random draws anew",
            found="init=random, init.latent=compress",
            expected="one of the two",
            remedy="leave init.latent out",
        )
    if start == "exact" and init.name != "random" and shared not in (None, "moe.shared_neurons=all"):
        raise ConfigError(
            "with init.latent=exact the shared expert is the whole FFN",
            found=f"moe.latent={moe.latent}, {shared}",
            expected="moe.shared_neurons=all",
            remedy="set moe.shared_neurons=all and moe.shared_experts=0, or init.latent=compress",
        )
    if start == "compress" and (moe.shared_experts or moe.shared_neurons == "all"):
        raise ConfigError(
            "with init.latent=compress the shared expert takes neurons of the FFN, or there is none",
            found=f"moe.latent={moe.latent}, {shared}",
            expected="a number of neurons, or null",
            remedy="set moe.shared_neurons=NUMBER and moe.shared_experts=0, or init.latent=exact",
        )


def check_tokens(tokens: int, hidden_size: int) -> None:
    """Check that the projections are measured on enough text.

    Raises:
        ConfigError: on too little.
    """
    least = TOKENS_PER_DIRECTION * hidden_size
    if tokens < least:
        raise ConfigError(
            "calibration_tokens is too small to measure latent projections",
            found=tokens,
            expected=f"{TOKENS_PER_DIRECTION} for each of the {hidden_size} dimensions, {least}, or more",
            remedy=f"set calibration_tokens={least}",
        )


def latent_losses(latent: int | None, init: InitConfig, hidden_size: int, latents: Latents) -> Iterator[str]:
    """Why step 0 differs from the dense model, where projections are the reason."""
    if latent_start(latent, init, hidden_size) != "compress":
        return
    said = f"init.latent=compress: routed experts see {latent} of {hidden_size} dimensions"
    if not latents.errors:
        yield f"{said}; convert measures the error of every layer's FFN"
        return
    errors = latents.errors
    listed = ", ".join(f"{error:.3f} in layer {layer}" for layer, error in errors.items())
    mean = sum(errors.values()) / len(errors)
    yield f"{said}; relative error of the FFN's output on other text: {mean:.3f} on average; {listed}"


def latent_notes(latent: int | None, init: InitConfig, hidden_size: int) -> Iterator[str]:
    """What else a user should know."""
    start = latent_start(latent, init, hidden_size)
    if start == "exact" and init.name != "random":
        yield (
            "init.latent=exact: fc2 is 0, so that at the first step it alone of the routed path gets a gradient; every "
            "token pays for the dense FFN, which is the shared expert, and for its routed experts"
        )
    if calibrates(latent, init, hidden_size):
        yield "convert measures the projections on text, for which it loads the dense model whole, in float32"


def _shared(moe: MoeConfig) -> str | None:
    """What is asked for of the shared expert."""
    if moe.shared_experts:
        return f"moe.shared_experts={moe.shared_experts}"
    return None if moe.shared_neurons is None else f"moe.shared_neurons={moe.shared_neurons}"
