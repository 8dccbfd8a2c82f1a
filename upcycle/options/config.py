"""Options of every command as frozen dataclasses; the defaults are in `conf/`. Knows only the errors, and not torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """`moe.*`.

    Attributes:
        expansion: E, copies of the dense FFN.
        granularity: G, shards per FFN.
        top_k: T, routed experts active per token.
        router_order: softmax_topk, topk_softmax or sigmoid_topk; auto takes what the family's own mixtures have, and
            softmax_topk where there are none.
        shared_experts: experts of the same width that every token uses, made of further copies of shards.
        shared_neurons: null; or so many neurons of the FFN, which the shared expert takes at weight 1, so that only the
            others are cut; or all: the shared expert is the FFN, and routed experts start with outputs of 0.
        layers: "all", "every_K" (every K-th layer, ending with the K-th), or a list of indices.
        groups: how experts of virtual groups are chosen: free (one by one), tied (one router row per group), whole
            (groups are chosen), positions (of each shard position the best T/G); auto takes what keeps the start and
            the type can store. Of training, for model=checkpoint too: there auto is what the checkpoint says.
        latent: null; or L, the size in which routed experts compute, between two projections; at most the hidden size.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    expansion: float
    granularity: int
    top_k: int
    router_order: str
    shared_experts: int
    shared_neurons: Any
    layers: Any
    groups: str
    latent: int | None


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """`init.*`; `name` says which fields beyond the first four matter.

    Attributes:
        name: virtual_group, copy, drop, noise or random.
        scaling: exact, paper, down, calibrated, none, or the factor itself.
        router_std: standard deviation of the router's rows; null takes 0.012/sqrt(hidden size).
        latent: with moe.latent below the hidden size: exact (the shared expert is the FFN, and what routed experts add
            starts at 0) or compress (routed experts are the FFN as far as the latents hold it).
        ratio: drop: share of an expert's neurons that is re-initialised.
        neurons: drop: coherent (one set for gate, up and down) or independent (one set each).
        std: noise: standard deviation of the noise, in units of the matrix's own. random: of the weights.
        fraction: noise: share of the weights that it is added to.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    scaling: Any
    router_std: float | None
    latent: str = "exact"
    ratio: float = 0.0
    neurons: str = "coherent"
    std: float = 0.0
    fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What `plan` and `convert` share.

    Attributes:
        source: directory, GGUF file or Hub id of the dense model.
        output: directory of the MoE checkpoint.
        target: auto, or a MoE type by name.
        portable: also write what other engines need and what changes nothing, such as biases of zeros.
        mtp: layers for multi-token prediction: keep (the source's), none, or a new block: copy (of the model's last
            layers, with its output as input) or random.
        dtype: auto (the source's), float32, bfloat16 or float16.
        seed: seed of everything random.
        max_shard_size: size limit of one safetensors file, such as 5GB or 500MB.
        workers: processes that write, each files of its own.
        calibration_tokens: tokens of Python source that is measured on (init.scaling=calibrated, init.latent=compress).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    source: str
    output: str | None
    target: str
    portable: bool
    mtp: str
    dtype: str
    seed: int
    max_shard_size: str
    workers: int
    calibration_tokens: int
    moe: MoeConfig
    init: InitConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ConversionConfig):
    """`upcycle convert`.

    Attributes:
        overwrite: replace an existing output.
        resume: continue an interrupted conversion.
        part: null, or I/N: write the I-th of N ranges of the files; the last part to end makes the output.
        verify: have `upcycle verify`, with its defaults, measure the output.
    """

    output: str
    overwrite: bool
    resume: bool
    part: str | None
    verify: bool


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """`upcycle verify`.

    Attributes:
        source: the dense model.
        moe: directory of the MoE checkpoint.
        text: file to measure on; null takes the standard library's argparse.py.
        tokens: tokens of the text to use.
        sequence_length: tokens per forward pass, at most the positions that the model has.
        tolerance: largest relative gap of the losses that passes.
        format: table or json.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    source: str
    moe: str
    text: str | None
    tokens: int
    sequence_length: int
    tolerance: float
    format: str


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`upcycle inspect DIR`.

    Attributes:
        path: directory of a checkpoint.
        format: table or json.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    path: str
    format: str
