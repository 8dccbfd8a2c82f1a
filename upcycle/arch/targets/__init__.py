"""One file per MoE type.

Among types that express a request exactly, one that more engines serve exactly is preferred, then the earlier one here.
"""

from __future__ import annotations

from upcycle.arch.targets import (
    flex_olmo,
    granitemoeshared,
    mixtral,
    nemotron_h,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    upcycled_moe,
)

_MODULES = (mixtral, qwen2_moe, qwen3_moe, flex_olmo, olmoe, granitemoeshared, nemotron_h, upcycled_moe)
TARGETS = {module.TARGET.model_type: module.TARGET for module in _MODULES}
