"""Tables that several families share."""

from __future__ import annotations

QKVO = {
    "self_attn.q_proj.weight": "Q H",
    "self_attn.k_proj.weight": "K H",
    "self_attn.v_proj.weight": "K H",
    "self_attn.o_proj.weight": "H Q",
}
QKV_BIAS = {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"}
QKVO_BIAS = {**QKV_BIAS, "self_attn.o_proj.bias": "H"}
HEAD_QK_NORM = {"self_attn.q_norm.weight": "D", "self_attn.k_norm.weight": "D"}
FULL_QK_NORM = {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}
PRE_NORM = {"input_layernorm.weight": "H", "post_attention_layernorm.weight": "H"}
POST_NORM = {"post_attention_layernorm.weight": "H", "post_feedforward_layernorm.weight": "H"}
SANDWICH_NORM = {**PRE_NORM, "pre_feedforward_layernorm.weight": "H", "post_feedforward_layernorm.weight": "H"}
EMBEDDING = {"model.embed_tokens.weight": "V H"}
EMBEDDING_AND_NORM = {**EMBEDDING, "model.norm.weight": "H"}
