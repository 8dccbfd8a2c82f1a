"""Tiny models as GGUF files."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<|end|>", *bytes_to_unicode().values(), "he"]


def shapes(kv_heads: int = KV_HEADS) -> dict[str, tuple[int, ...]]:
    vocab, kv = len(vocabulary()), HIDDEN // HEADS * kv_heads
    found = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (vocab, HIDDEN)}
    for block in (f"blk.{layer}." for layer in range(LAYERS)):
        found |= {block + "attn_norm.weight": (HIDDEN,), block + "ffn_norm.weight": (HIDDEN,)}
        found |= {block + "attn_q.weight": (HIDDEN, HIDDEN), block + "attn_output.weight": (HIDDEN, HIDDEN)}
        found |= {block + "attn_k.weight": (kv, HIDDEN), block + "attn_v.weight": (kv, HIDDEN)}
        found |= {block + "ffn_up.weight": (FFN, HIDDEN), block + "ffn_down.weight": (HIDDEN, FFN)}
        found |= {block + "ffn_gate.weight": (FFN, HIDDEN)}
    return found


def add_tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] + [1] * (len(vocabulary()) - 1))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def write_gguf(path, matrices, *, arch="llama", kv_heads=KV_HEADS, ffn=FFN, dropped=(), extra=None, vectors=Kind.F32):
    """Write a tiny model whose matrices are stored, in turn, in the `matrices` types and whose vectors in `vectors`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_length(HIDDEN // HEADS)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    add_tokenizer(writer)
    generator = np.random.default_rng(0)
    stored = shapes(kv_heads or HEADS) | (extra or {})
    for position, (name, shape) in enumerate(stored.items()):
        values = generator.standard_normal(shape, dtype=np.float32)
        kind = matrices[position % len(matrices)] if len(shape) > 1 else vectors
        if name not in dropped:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
