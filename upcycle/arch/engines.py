"""What other engines make of a MoE type, as data: where they compute what transformers computes, and where not.

Measured by `make test-engines` (benchmarks/results/engines.json), which fails where an engine and this table differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from upcycle.arch.backbone import rope_type, usual_mamba_biases, window_kind
from upcycle.arch.head import REWARD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.backbone import AttentionBias, Windows
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape

Engine = Literal["vLLM", "llama.cpp", "transformers 4.57"]
Verdict = Literal["exact", "refuses", "differs", "unmeasured"]
ENGINES: tuple[Engine, ...] = ("vLLM", "llama.cpp", "transformers 4.57")
IN_WORDS: Mapping[Verdict, str] = {
    "exact": "served exactly",
    "refuses": "does not load it",
    "differs": "computes something else",
    "unmeasured": "not measured",
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What of a checkpoint an engine may not be able to do.

    Attributes:
        router_order: of softmax and top-k.
        shared: whether there are shared experts.
        dense_layers: whether some layers keep their FFN.
        windows: sliding windows: none, the same on all layers, or any mixture.
        attention_bias: which projections have a bias.
        heads_fill: whether heads times their size is the hidden size.
        rope: kind of rotary scaling, as config.json has it.
        tied: whether the head is the embedding.
        portable: whether the type's `Padding` is written.
        reward: whether its head gives scores and not logits.
        usual_mamba_biases: whether Mamba-2 has a bias in its convolution and nowhere else.
    """

    router_order: str
    shared: bool
    dense_layers: bool
    windows: Windows
    attention_bias: AttentionBias
    heads_fill: bool
    rope: str
    tied: bool
    portable: bool
    reward: bool = False
    usual_mamba_biases: bool = True


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Checkpoints with which an engine does something else than transformers, or with a reservation what it does.

    Attributes:
        engine: its name.
        types: MoE types.
        when: `Features` that all have to be so; a tuple holds several values that do.
        verdict: refuses, or differs: it computes something else without a message; or unmeasured, or exact.
        why: what it does, for a person.
    """

    engine: Engine
    types: tuple[str, ...]
    when: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict
    why: str


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What an engine does with a checkpoint."""

    engine: Engine
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        return f"{self.engine}: {IN_WORDS[self.verdict]}" + (f": {self.why}" if self.why else "")


UNPADDED = "set portable=true"
RENORMALISES = "renormalises top-k weights whatever norm_topk_prob says"
NEVER_RENORMALISES = "never renormalises top-k weights, whatever norm_topk_prob says"
STEPS = "but for time steps below time_step_min, which transformers alone raises to it"
WITH_TRANSFORMERS = "--model-impl transformers serves it exactly"


def _unmeasured(types: tuple[str, ...], why: str, **when: Any) -> tuple[Rule, ...]:
    """What no engine was tried with."""
    return tuple(Rule(engine=engine, types=types, when=when, verdict="unmeasured", why=why) for engine in ENGINES)


# In the order in which they are met: what does not load computes nothing.
RULES = (
    *_unmeasured(("mixtral", "qwen2_moe", "qwen3_moe"), "a head that gives scores", reward=True),
    Rule(engine="vLLM", types=("upcycled_moe",), verdict="refuses", why="it has no such type"),
    Rule(
        engine="vLLM",
        types=("qwen2_moe",),
        when={"portable": False, "shared": False},
        verdict="refuses",
        why=f"it takes no shared expert of width 0: {UNPADDED}",
    ),
    Rule(
        engine="vLLM",
        types=("qwen2_moe",),
        when={"portable": False, "attention_bias": "none"},
        verdict="differs",
        why=f"biases of queries, keys and values that are not there it leaves uninitialised: {UNPADDED}",
    ),
    Rule(
        engine="vLLM",
        types=("qwen2_moe", "granitemoeshared"),
        when={"heads_fill": False},
        verdict="differs",
        why="it takes heads of the hidden size over their number, whatever head_dim says",
    ),
    Rule(
        engine="vLLM",
        types=("qwen2_moe",),
        when={"windows": "mixed"},
        verdict="differs",
        why="it gives every layer the window",
    ),
    Rule(
        engine="vLLM",
        types=("qwen3_moe",),
        when={"attention_bias": "qkvo"},
        verdict="differs",
        why="it drops the bias of attention's output",
    ),
    Rule(
        engine="vLLM",
        types=("granitemoeshared",),
        when={"attention_bias": "qkvo"},
        verdict="differs",
        why=f"it drops the biases of attention; {WITH_TRANSFORMERS}",
    ),
    Rule(
        engine="vLLM",
        types=("olmoe",),
        when={"router_order": "topk_softmax"},
        verdict="differs",
        why=f"it {NEVER_RENORMALISES}; {WITH_TRANSFORMERS}",
    ),
    Rule(
        engine="vLLM",
        types=("nemotron_h",),
        verdict="exact",
        why=f"measured with un-gated experts computed for it, which it has on GPUs alone; {STEPS}",
    ),
    Rule(engine="llama.cpp", types=("upcycled_moe", "flex_olmo"), verdict="refuses", why="it has no such type"),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe", "qwen3_moe"),
        when={"dense_layers": True},
        verdict="refuses",
        why="its experts are in every layer",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen3_moe",),
        when={"attention_bias": "qkvo"},
        verdict="refuses",
        why="its attention has no biases",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe", "granitemoeshared"),
        when={"heads_fill": False},
        verdict="refuses",
        why="its heads fill the hidden size",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe",),
        when={"portable": False, "tied": True},
        verdict="refuses",
        why=f"its head is never tied: {UNPADDED}",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe",),
        when={"portable": False, "shared": False},
        verdict="refuses",
        why=f"it takes no shared expert of width 0: {UNPADDED}",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe",),
        when={"portable": False},
        verdict="differs",
        why=f"a shared expert's gate of zeros gives 0/0: {UNPADDED}",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe", "olmoe"),
        when={"router_order": "topk_softmax"},
        verdict="differs",
        why=f"it {NEVER_RENORMALISES}",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen3_moe",),
        when={"router_order": "softmax_topk"},
        verdict="differs",
        why=f"it {RENORMALISES}",
    ),
    Rule(
        engine="llama.cpp",
        types=("granitemoeshared",),
        when={"rope": "llama3"},
        verdict="refuses",
        why="it has no rotary scaling of Llama 3",
    ),
    Rule(
        engine="llama.cpp",
        types=("qwen2_moe", "qwen3_moe"),
        when={"rope": "llama3"},
        verdict="differs",
        why="its converter leaves the rotary scaling of Llama 3 out",
    ),
    Rule(
        engine="llama.cpp",
        types=("mixtral", "qwen2_moe", "qwen3_moe"),
        when={"windows": ("uniform", "mixed")},
        verdict="differs",
        why="it ignores sliding windows: right up to the window's length",
    ),
    Rule(
        engine="llama.cpp",
        types=("nemotron_h",),
        when={"dense_layers": True},
        verdict="refuses",
        why="its mixtures have experts in the place of every FFN",
    ),
    Rule(
        engine="llama.cpp",
        types=("nemotron_h",),
        when={"usual_mamba_biases": False},
        verdict="refuses",
        why="its Mamba-2 has a bias in the convolution and nowhere else",
    ),
    Rule(engine="llama.cpp", types=("nemotron_h",), verdict="exact", why=STEPS),
    Rule(engine="transformers 4.57", types=("upcycled_moe",), verdict="refuses", why="its code needs transformers 5"),
    Rule(
        engine="transformers 4.57",
        types=("qwen2_moe", "granitemoeshared"),
        when={"heads_fill": False},
        verdict="refuses",
        why="its heads fill the hidden size",
    ),
    Rule(
        engine="transformers 4.57",
        types=("qwen2_moe",),
        when={"windows": ("uniform", "mixed")},
        verdict="differs",
        why="its windows are the same in all layers, and wrong with a cache",
    ),
    Rule(engine="transformers 4.57", types=("nemotron_h",), verdict="refuses", why="it has no such type"),
    *_unmeasured(
        ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "olmoe", "granitemoeshared"),
        "rotary scaling of this kind",
        rope=("dynamic", "longrope"),
    ),
)


def features(model: DenseModel, moe: MoeShape, *, portable: bool) -> Features:
    """The features of what a conversion makes."""
    return Features(
        router_order=moe.router_order,
        shared=moe.shared_width > 0,
        dense_layers=len(moe.layers) < len(model.ffn_layers),
        windows=window_kind(model.backbone.windows),
        attention_bias=model.backbone.attention_bias,
        heads_fill=model.sizes["Q"] == model.hidden_size,
        rope=rope_type(model.config),
        tied=model.tied,
        portable=portable,
        reward=model.head is REWARD,
        usual_mamba_biases=usual_mamba_biases(model.config),
    )


def serving(model_type: str, found: Features) -> tuple[Serving, ...]:
    """What every engine does with a checkpoint of a MoE type."""
    has = asdict(found)
    met: dict[Engine, Serving] = {}
    for rule in RULES:
        if model_type in rule.types and all(_is(has[name], value) for name, value in rule.when.items()):
            met.setdefault(rule.engine, Serving(engine=rule.engine, verdict=rule.verdict, why=rule.why))
    return tuple(met.get(engine, Serving(engine=engine, verdict="exact")) for engine in ENGINES)


def _is(found: object, wanted: object) -> bool:
    return found in wanted if isinstance(wanted, tuple) else found == wanted
