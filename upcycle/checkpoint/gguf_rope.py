"""The rotary embedding of a GGUF file, as transformers' `rope_parameters`; formulas are theirs and llama.cpp's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from upcycle.checkpoint.gguf_keys import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS: Final = frozenset({FREQS, LONG, SHORT})
_S = "rope.scaling."
ROPE_KEYS: Final = frozenset(
    {"rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"}
    | {_S + key for key in ("type", "factor", "original_context_length", "attn_factor", "finetuned")}
    | {_S + "yarn_" + key for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")}
)
_BASE: Final = 10_000.0  # llama.cpp's, of full and of sliding layers, where the file says none
_RELATIVE: Final = 1e-6  # two float32 of one number
_EPSILON: Final = float(torch.finfo(torch.float32).eps)


class Rope:
    """What a file says of rotary positions.

    Args:
        path: the file, for errors.
        values: value of every key that is there, and head size and positions (`attention.key_length`,
            `context_length`), by key without the architecture.
        tensors: the file's `ROPE_TENSORS`.
        usual: `rope_parameters` of a configuration of the model type that says nothing of it.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], usual: Mapping[str, Any] | None
    ) -> None:
        self._path, self._values, self._tensors, self._usual = path, values, tensors, usual
        self._head, self._positions = values["attention.key_length"], values["context_length"]
        self.rotated = int(values.get("rope.dimension_count", self._head))
        self.original = int(values.get(_S + "original_context_length", self._positions))

    def parameters(self, frequencies: Callable[[Mapping[str, Any]], Tensor]) -> dict[str, Any] | None:
        """Return `rope_parameters` for the model type, None for one without rotary positions.

        Args:
            frequencies: transformers' inverse frequencies with given `rope_parameters` of full attention.

        Raises:
            SourceError: the file says what they cannot express.
        """
        if self._usual is None:
            self._check_nothing_said()
            return None
        base = float(self._values.get("rope.freq_base", _BASE))
        plain = {"rope_theta": base, **self._part()}
        full = {**plain, **(self._scaling() or self._from_tensors(plain, frequencies) or {"rope_type": "default"})}
        sliding = self._values.get("rope.freq_base_swa")
        if "full_attention" in self._usual:
            local = {"rope_type": "default", "rope_theta": float(sliding or _BASE)}
            return {"full_attention": full, "sliding_attention": local}
        if sliding is not None and not _same(sliding, base):
            raise refusal(self._path, f"rope.freq_base_swa = {sliding}", f"rope.freq_base, {base}, on every layer")
        return full

    def _check_nothing_said(self) -> None:
        said = [key for key in sorted(ROPE_KEYS & self._values.keys()) if self._values[key] != "none"]
        if found := said + sorted(self._tensors):
            raise refusal(self._path, ", ".join(found), "a model without rotary positions, as its architecture is")

    def _part(self) -> dict[str, float]:
        """The share of a head that is rotated, for model types that know of one."""
        assert self._usual is not None
        part = self.rotated / self._head
        takes = "partial_rotary_factor" in self._usual
        if self.rotated != self._head and not (takes and int(self._head * part) == self.rotated):
            raise refusal(self._path, f"rope.dimension_count = {self.rotated}", f"{self._head}, the size of a head")
        return {"partial_rotary_factor": part} if takes else {}

    def _number(self, key: str, default: float) -> float:
        return float(self._values.get(_S + key, default))

    def _must_be(self, key: str, *expected: float) -> None:
        found = self._values.get(_S + key)
        if found is not None and not any(_same(found, value) for value in expected):
            raise refusal(self._path, f"{_S}{key} = {found}", " or ".join(map(str, expected)))

    def _scaling(self) -> dict[str, Any] | None:
        """Scaling by keys, None where there is none."""
        factor = self._number("factor", float(self._values.get("rope.scale_linear", 1.0))) or 1.0
        kind = self._values.get(_S + "type", "linear")
        tensors = sorted(self._tensors)
        if kind == "yarn":
            if tensors:
                raise refusal(self._path, f"{_S}type = yarn with {', '.join(tensors)}", "one scaling")
            return self._yarn(factor)
        self._must_be("yarn_ext_factor", 0.0, -1.0)
        self._must_be("yarn_attn_factor", 1.0)
        self._must_be("yarn_log_multiplier", 0.0)
        if kind not in ("none", "linear", "longrope"):
            raise refusal(self._path, f"{_S}type = {kind}", "none, linear, yarn or longrope")
        if kind == "longrope" and LONG not in tensors:
            raise refusal(self._path, f"{_S}type = longrope without {LONG}", "the factors of every frequency")
        if kind == "none" or factor == 1.0:
            return None
        if tensors:
            raise refusal(self._path, f"{_S}factor = {factor} with {', '.join(tensors)}", "one scaling")
        self._must_be("attn_factor", 1.0)
        return {"rope_type": "linear", "factor": factor}

    def _yarn(self, factor: float) -> dict[str, Any]:
        usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        self._must_be("yarn_ext_factor", 1.0, -1.0)
        self._must_be("yarn_log_multiplier", 0.0)
        # Converters write transformers' attention_factor and the paper's multiplier of it under this one key.
        self._must_be("yarn_attn_factor", usual)
        found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        found["original_max_position_embeddings"] = self.original
        for name in ("beta_fast", "beta_slow"):
            if (beta := self._values.get(_S + "yarn_" + name)) is not None:
                if beta <= 0:
                    raise refusal(self._path, f"{_S}yarn_{name} = {beta}", "a positive number")
                found[name] = beta
        multiplier = self._number("attn_factor", 1.0)
        return found if multiplier == 1.0 else {**found, "attention_factor": multiplier * usual}

    def _from_tensors(
        self, plain: Mapping[str, Any], frequencies: Callable[[Mapping[str, Any]], Tensor]
    ) -> dict[str, Any] | None:
        """Scaling by tensors of one factor for each frequency, None where there is none."""
        for name, factors in self._tensors.items():
            if factors.shape != (self.rotated // 2,) or not bool((factors > 0).all()):
                found = f"{name} with {tuple(factors.shape)} values from {factors.min():.3g}"
                raise refusal(self._path, found, f"{self.rotated // 2} factors above 0")
        if {LONG, SHORT} & self._tensors.keys():
            return self._longrope()
        self._must_be("attn_factor", 1.0)
        if FREQS not in self._tensors:
            return None
        factors = self._tensors[FREQS].double()
        if bool((factors == factors[0]).all()):
            factor = float(factors[0])
            return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
        unscaled = frequencies({**plain, "rope_type": "linear", "factor": 1.0}).double()
        for candidate in _llama3_candidates(factors, unscaled):
            scaled = frequencies({**plain, **candidate}).double()
            # The converter's steps in float32 leave 4 units in 1 / factor, whose size is that of 1 at most.
            error = (scaled * factors / unscaled - 1).abs()
            if bool((error <= 4 * _EPSILON * factors).all()):
                return candidate
        shown = ", ".join(f"{value:.4g}" for value in factors.tolist()[:8])
        raise refusal(self._path, f"{FREQS} = {shown} …", "the factors of a linear or llama3 scaling")

    def _longrope(self) -> dict[str, Any]:
        if missing := {LONG, SHORT} - self._tensors.keys():
            raise refusal(self._path, f"rope factors without {missing.pop()}", f"{LONG} and {SHORT}")
        if FREQS in self._tensors:
            raise refusal(self._path, f"{FREQS} with {LONG}", "one scaling")
        found: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": self.original}
        found |= {"long_factor": self._tensors[LONG].tolist(), "short_factor": self._tensors[SHORT].tolist()}
        longer = self._positions / self.original
        usual = math.sqrt(1 + math.log(longer) / math.log(self.original)) if longer > 1 else 1.0
        attention = self._number("attn_factor", 1.0)
        return found if _same(attention, usual) else {**found, "attention_factor": attention}


def _llama3_candidates(factors: Tensor, unscaled: Tensor) -> Iterator[dict[str, Any]]:
    """Parameters that may have given the factors: Meta's, other contexts with Meta's bounds, and the tensor's solution.

    Between the bounds, 1 / factor is a line in the inverse wavelength (transformers' `_compute_llama3_parameters`), so
    two factors give it; the context only scales both bounds, and is taken so that the lower one is 1.

    Args:
        factors: what divides each inverse frequency, (frequencies,).
        unscaled: inverse frequencies in radians per token, (frequencies,).
    """
    factor = float(factors[-1])
    if factor <= 1:
        return
    found = {"rope_type": "llama3", "factor": factor}

    def parameters(context: int, low: float, high: float) -> dict[str, Any]:
        bounds = {"low_freq_factor": low, "high_freq_factor": high}
        return {**found, **bounds, "original_max_position_embeddings": context}

    for context in (8192, *(2**power for power in range(4, 21))):
        yield parameters(context, 1.0, 4.0)
    between = torch.nonzero((factors > 1 + _RELATIVE) & (factors < factor * (1 - _RELATIVE))).flatten().tolist()
    if len(between) < 2:
        return
    inverse, waves = 1 / factors, unscaled / (2 * math.pi)
    first, last = between[0], between[-1]
    slope = float((inverse[first] - inverse[last]) / (waves[first] - waves[last]))
    if slope <= 0:
        return
    low = float(waves[last]) + (1 / factor - float(inverse[last])) / slope
    high = float(waves[last]) + (1 - float(inverse[last])) / slope
    if not 0 < low < high:
        return
    context = max(round(1 / low), 1)
    yield parameters(context, 1.0, float(round(high / low)))
    yield parameters(context, low * context, high * context)


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE)
