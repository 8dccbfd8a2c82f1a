"""The generic type: any dense model of the families with its FFNs replaced; its code travels with the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.head import CAUSAL
from upcycle.arch.target import OF_THE_FILE, Layout, Target

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape

ARCHITECTURE = f"UpcycledMoe{CAUSAL.suffix}"


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    dropout = model.family.ffn.dropout
    return {
        "text_config": {name: value for name, value in model.config.to_dict().items() if name not in OF_THE_FILE},
        "tie_word_embeddings": model.tied,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_width,
        "shared_expert_intermediate_size": moe.shared_width,
        "moe_latent_size": moe.latent,
        "router_order": moe.router_order,
        "router_renormalise": moe.router_order == "sigmoid_topk",
        "moe_layers": list(moe.layers),
        "ffn_path": model.ffn_module(),
        "gated": model.gated,
        "hidden_act": model.activation,
        "ffn_bias": model.ffn_bias,
        "ffn_dropout": getattr(model.config, dropout) if dropout else 0.0,
        "granularity": moe.granularity,
        "expansion": moe.expansion,
        "groups": moe.groups,
        "auto_map": {
            "AutoConfig": "configuration_upcycled_moe.UpcycledMoeConfig",
            model.head.auto: f"modeling_upcycled_moe.{model.head.architecture(ARCHITECTURE)}",
        },
    }


TARGET = Target(
    model_type="upcycled_moe",
    architecture=ARCHITECTURE,
    reward=True,
    generic=True,
    shared=True,
    dense_layers=True,
    layout=Layout(
        prefix="language_model.",
        router="{ffn}.gate.weight",
        experts={
            "gate_up": "{ffn}.experts.gate_up_proj",
            "up": "{ffn}.experts.up_proj",
            "down": "{ffn}.experts.down_proj",
        },
        shared={
            "gate": "{ffn}.shared_expert.gate_proj.weight",
            "up": "{ffn}.shared_expert.up_proj.weight",
            "down": "{ffn}.shared_expert.down_proj.weight",
        },
        latent=("{ffn}.fc1_latent_proj.weight", "{ffn}.fc2_latent_proj.weight"),
    ),
    blocks=("{ffn}",),
    router_module="{ffn}.gate",
    fields=fields,
)
