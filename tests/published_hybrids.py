"""Published hybrids of Mamba-2, attention and FFNs or experts as configs, and what their makers say of their size.

Layers in the order of their kinds: counts do not depend on it. Sizes of the models as in the recipes of
Megatron-Bridge and the models' own config.json; totals as on their cards, active ones of the reports 2512.20848 and
2512.20856 rounded.
"""

from __future__ import annotations

from typing import Any

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def hybrid(
    layers: tuple[int, int, int, int],
    hidden: int,
    width: int,
    mamba: tuple[int, int, int],
    heads: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    """config.json of a hybrid.

    Args:
        layers: of Mamba-2, attention, FFNs, experts.
        hidden: hidden size.
        width: of an FFN, or of an expert.
        mamba: heads, their size, and states.
        heads: of queries, and of keys and values.
        more: further fields.
    """
    pattern = "".join(letter * count for letter, count in zip("M*-E", layers, strict=True))
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 131072,
        "hidden_size": hidden,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "intermediate_size": width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "mamba_num_heads": mamba[0],
        "mamba_head_dim": mamba[1],
        "ssm_state_size": mamba[2],
        "n_groups": 8,
        "conv_kernel": 4,
        "tie_word_embeddings": False,
        **more,
    }


def mixture(experts: int, top_k: int, width: int, **more: Any) -> dict[str, Any]:
    """The fields of a mixture whose shared expert is as wide as two of the others."""
    routed = {"n_routed_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    return {**routed, "moe_shared_expert_intermediate_size": 2 * width, "n_shared_experts": 1, **more}


_NANO = {"layers": (23, 6, 0, 23), "hidden": 2688, "width": 1856, "mamba": (64, 64, 128), "heads": (32, 2)}
CONFIGS = {
    "Nemotron-H-4B": hybrid((24, 4, 24, 0), 3072, 12288, (112, 64, 128), (32, 8)),
    "Nemotron-H-8B": hybrid((24, 4, 24, 0), 4096, 21504, (128, 64, 128), (32, 8)),
    "Nemotron-H-47B": hybrid((45, 5, 48, 0), 8192, 30720, (256, 64, 256), (64, 8)),
    "Nemotron-H-56B": hybrid((54, 10, 54, 0), 8192, 32768, (256, 64, 256), (64, 8)),
    "Nemotron-Nano-9B-v2": hybrid((27, 4, 25, 0), 4480, 15680, (128, 80, 128), (40, 8)),
    "Nemotron-Nano-12B-v2": hybrid((28, 6, 28, 0), 5120, 20480, (128, 80, 128), (40, 8)),
    "Nemotron-3-Nano-4B": hybrid((21, 4, 17, 0), 3136, 12544, (96, 80, 128), (40, 8)),
    "Nemotron-3-Nano-30B-A3B": hybrid(**_NANO, **mixture(128, 6, 1856)),
    "Nemotron-3.5-Lightning-30B": hybrid(**_NANO, **mixture(128, 6, 1856), **MTP),
    "Nemotron-3-Super-120B-A12B": hybrid(
        (40, 8, 0, 40), 4096, 2688, (128, 64, 128), (32, 2), **mixture(512, 22, 2688, moe_latent_size=1024), **MTP
    ),
    "Nemotron-3-Ultra-550B-A55B": hybrid(
        (48, 12, 0, 48), 8192, 5120, (256, 64, 128), (64, 2), **mixture(512, 22, 5120, moe_latent_size=2048), **MTP
    ),
}
# Parameters and tensors, to the digit.
EXACT = {
    "Nemotron-3-Nano-4B": (3_973_556_832, 263),
    "Nemotron-3.5-Lightning-30B": (32_913_266_240, 6_513),
    "Nemotron-3-Super-120B-A12B": (123_611_033_088, 42_683),
}
# Billions without multi-token prediction, in all and active.
BILLIONS = {
    "Nemotron-H-4B": (4.489, 4.489),
    "Nemotron-H-8B": (8.101, 8.101),
    "Nemotron-H-47B": (46.79, 46.79),
    "Nemotron-H-56B": (56.32, 56.32),
    "Nemotron-Nano-9B-v2": (8.888, 8.888),
    "Nemotron-Nano-12B-v2": (12.310, 12.310),
    "Nemotron-3-Nano-4B": (3.974, 3.974),
    "Nemotron-3-Nano-30B-A3B": (31.578, 3.580),
    "Nemotron-3.5-Lightning-30B": (31.578, 3.580),
    "Nemotron-3-Super-120B-A12B": (120.669, 12.770),
    "Nemotron-3-Ultra-550B-A55B": (549.31, 56.06),
}
