"""TransformerEngine's linear layer in FP8 against the emulator."""

from __future__ import annotations

import torch
from needs import device, need, say

from upcycle.precision.linear import Emulation, Site, quantised_linear
from upcycle.precision.recipes import RECIPES

CLOSE = 2e-2  # relative: outputs in bfloat16
card = device()
need("transformer_engine")
import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common.recipe import Float8CurrentScaling  # noqa: E402

torch.manual_seed(0)
layer = te.Linear(512, 384, bias=False, params_dtype=torch.bfloat16, device=card)
x = torch.randn(256, 512, device=card, dtype=torch.bfloat16, requires_grad=True)
with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
    theirs = layer(x)
direction = torch.randn_like(theirs)
theirs.backward(direction)
mine, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
site = Site(name="layer", recipe=RECIPES["fp8_current"], emulation=Emulation(0))
ours = quantised_linear(mine, weight, site)
ours.backward(direction)
pairs = {"y": (theirs, ours), "dx": (x.grad, mine.grad), "dW": (layer.weight.grad, weight.grad)}
gaps = {name: float((a.float() - b.float()).norm() / b.float().norm()) for name, (a, b) in pairs.items()}
say({name: f"{gap:.1e}" for name, gap in gaps.items()})
if max(gaps.values()) > CLOSE:
    raise SystemExit(f"TransformerEngine and the emulator differ: {gaps}")
