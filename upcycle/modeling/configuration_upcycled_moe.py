"""Configuration of the `upcycled_moe` model.

This file travels inside converted checkpoints, beside selection_upcycled_moe.py: it may import only that file,
transformers and the standard library.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .selection_upcycled_moe import GROUPS, ROUTER_ORDERS


class UpcycledMoeConfig(PreTrainedConfig):
    """A dense causal LM's configuration, and what replaces the FFNs of some of its layers.

    Args:
        text_config: the dense model's configuration, or its dict (with `model_type`).
        num_experts: routed experts per MoE layer (N).
        num_experts_per_tok: routed experts each token visits (K).
        moe_intermediate_size: width of one routed expert (I).
        moe_layers: indices of the layers whose FFN is a mixture of experts.
        ffn_path: where a layer's FFN sits in the dense causal LM, such as `model.layers.{layer}.mlp`.
        gated: whether experts compute `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        hidden_act: name of the activation in transformers' `ACT2FN`.
        ffn_bias: whether every projection of an expert has a bias.
        ffn_dropout: probability of dropping an element of the block's output in training (GPT-2 drops in its FFN).
        shared_expert_intermediate_size: width of the expert all tokens visit; 0 means none.
        moe_latent_size: size in which routed experts compute, between two projections (L); None: in the hidden size.
        router_order: `softmax_topk` (softmax over all experts), `topk_softmax` (softmax over the kept logits, so that
            weights sum to 1) or `sigmoid_topk` (each expert's own sigmoid).
        router_renormalise: whether the kept weights are divided by their sum.
        routed_scaling_factor: what the weights are multiplied by in the end.
        router_correction_bias: whether experts are chosen by score plus a bias (`e_score_correction_bias`), which does
            not enter the weights.
        groups: how experts of virtual groups of `granularity` are chosen: `free`, `tied`, `whole` or `positions`, as
            `ExpertSelection` in selection_upcycled_moe.py says.
        granularity: shards G each dense FFN was cut into.
        expansion: copies E of the dense FFN; expert `e * G + g` started as shard g of copy e.
        output_router_logits: whether the model returns router logits and adds the load-balancing loss by default.
        router_aux_loss_coef: weight of the load-balancing loss.
        tie_word_embeddings: always what `text_config` says.

    Raises:
        ValueError: an unknown router order or way to choose, more experts per token than experts, or groups asked for
            that the experts or the experts per token do not divide into.
    """

    model_type = "upcycled_moe"
    sub_configs = {"text_config": AutoConfig}
    has_no_defaults_at_init = True  # until 5.20 transformers made one without arguments, unless told
    _auto_class = "AutoConfig"
    has_no_defaults_at_init = True  # without text_config there is no default one to compare with
    base_model_fsdp_plan = {}  # the dense model's, which this one contains, is its own

    text_config: Any
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_layers: list[int]
    ffn_path: str
    gated: bool
    hidden_act: str
    ffn_bias: bool = False
    ffn_dropout: float = 0.0
    shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    router_order: str = "topk_softmax"
    router_renormalise: bool = False
    routed_scaling_factor: float = 1.0
    router_correction_bias: bool = False
    groups: str = "free"
    granularity: int = 1
    expansion: int = 1
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the dense configuration from its dict, and check the routing."""
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if kwargs.pop("select_groups", False):  # how the first checkpoints say it
            self.groups = "whole"
        if self.router_order not in ROUTER_ORDERS:
            raise ValueError(f"router_order must be one of {ROUTER_ORDERS}, found {self.router_order!r}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts = {self.num_experts}, "
                f"found {self.num_experts_per_tok}"
            )
        if self.groups not in GROUPS:
            raise ValueError(f"groups must be one of {GROUPS}, found {self.groups!r}")
        if self.groups != "free" and (
            self.num_experts_per_tok % self.granularity or self.num_experts % self.granularity
        ):
            raise ValueError(
                f"groups={self.groups} needs num_experts and num_experts_per_tok divisible by granularity = "
                f"{self.granularity}, found {self.num_experts} and {self.num_experts_per_tok}"
            )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
