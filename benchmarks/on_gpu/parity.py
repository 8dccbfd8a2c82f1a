"""Every kernel against `reference`: outputs and all gradients, in float32 and bfloat16."""

from __future__ import annotations

import torch
from cases import gradients, make_experts, routed
from needs import device, say

from upcycle.kernels.reference import reference
from upcycle.kernels.select import KERNELS

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of each tensor's largest value; TF32 is off
EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 8, 256, 128, 96, 3

card = device()
torch.backends.cuda.matmul.allow_tf32 = False
found, wrong = {}, []
for dtype, tolerance in TOLERANCE.items():
    torch.manual_seed(0)
    experts = make_experts(EXPERTS, HIDDEN, WIDTH, card, dtype)
    index, weights = routed(TOKENS, EXPERTS, TOP_K, card)
    x = torch.randn(TOKENS, HIDDEN, device=card, dtype=dtype)
    expected = gradients(reference, experts, x, index, weights.to(dtype))
    for name, kernel in KERNELS.items():
        case = f"{name} {str(dtype).removeprefix('torch.')}"
        error = kernel.objection(experts, card, dtype)
        if error:
            found[case] = f"refused: {error.what}"
            continue
        ours = gradients(kernel.forward, experts, x, index, weights.to(dtype))
        gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True))
        found[case] = f"{gap:.1e}"
        if gap > tolerance:
            wrong.append(case)
say(found)
if wrong:
    raise SystemExit(f"not the reference's: {', '.join(wrong)}")
