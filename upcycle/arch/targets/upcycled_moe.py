"""The generic type: any dense model of the families with its FFNs replaced; its code travels with the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.target import Layout, Target

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape

# What a dense config says about the file it came from, not about the model.
OF_THE_FILE = ("_name_or_path", "dtype", "transformers_version")
AUTO_MAP = {
    "AutoConfig": "configuration_upcycled_moe.UpcycledMoeConfig",
    "AutoModelForCausalLM": "modeling_upcycled_moe.UpcycledMoeForCausalLM",
}


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    width = model.ffn_width // moe.granularity
    dropout = model.family.ffn.dropout
    return {
        "text_config": {name: value for name, value in model.config.to_dict().items() if name not in OF_THE_FILE},
        "tie_word_embeddings": model.tied,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": moe.shared_experts * width,
        "router_order": moe.router_order,
        "moe_layers": list(moe.layers),
        "ffn_path": model.ffn_module(),
        "gated": model.family.ffn.gate is not None,
        "hidden_act": model.activation,
        "ffn_bias": model.ffn_bias,
        "ffn_dropout": getattr(model.config, dropout) if dropout else 0.0,
        "granularity": moe.granularity,
        "expansion": moe.expansion,
        "groups": moe.groups,
        "auto_map": AUTO_MAP,
    }


TARGET = Target(
    model_type="upcycled_moe",
    architecture="UpcycledMoeForCausalLM",
    generic=True,
    shared=True,
    dense_layers=True,
    layout=Layout(
        prefix="language_model.",
        experts={
            "gate_up": "mlp.experts.gate_up_proj",
            "up": "mlp.experts.up_proj",
            "down": "mlp.experts.down_proj",
        },
        shared={
            "gate": "mlp.shared_expert.gate_proj.weight",
            "up": "mlp.shared_expert.up_proj.weight",
            "down": "mlp.shared_expert.down_proj.weight",
        },
    ),
    fields=fields,
)
