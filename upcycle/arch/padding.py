"""What engines other than transformers must find in a checkpoint of a MoE type, and what changes nothing there.

`portable=true` writes it: biases and a shared expert of zeros, a shared expert's gate whose weights are not exactly 0,
and a copy of a tied head. None of it is trained: training leaves it out and `export` writes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# In config.json: the fields that speak of zeros, with what they would say without these.
PADDED = "upcycle_padding"
# A shared expert's gate in the place of 0. llama.cpp computes sigmoid(x) as silu(x)/x, which is NaN at 0; the sigmoid
# of 2^-60 times anything that a norm gives rounds to 0.5 in float32 too.
ALMOST_ZERO = 2.0**-60
ALMOST_ZERO_IN_FLOAT16 = 2.0**-24  # the smallest that it has


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What a type may lack in transformers and must have elsewhere.

    Attributes:
        bias_field: config field that says whether `biases` are there.
        biases: bias inside a layer -> its symbolic size, as in `Family`.
        width_field: config field of the shared expert's width.
        width: of a shared expert of zeros, where there is none: 32, which blocks of Q8_0 and Q4_0 hold.
        head, embedding: where the head is tied, it is stored too, as a copy of the embedding.
    """

    bias_field: str
    biases: Mapping[str, str]
    width_field: str
    width: int = 32
    head: str = "lm_head.weight"
    embedding: str = "model.embed_tokens.weight"

    def fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of config.json that change, `PADDED` among them; empty where nothing is padded."""
        padded = {self.bias_field: True, self.width_field: self.width}
        changed = {name: value for name, value in padded.items() if not config[name]}
        return {**changed, PADDED: {name: config[name] for name in changed}} if changed else {}

    def endings(self, padded: Mapping[str, Any], shared: Iterable[str]) -> tuple[str, ...]:
        """Names inside a layer of the tensors of zeros that a config.json with these fields in `PADDED` has.

        Args:
            padded: the fields in `PADDED`.
            shared: names of the type's shared expert's matrices.
        """
        biases = tuple(self.biases) if self.bias_field in padded else ()
        return (*biases, *(shared if self.width_field in padded else ()))
