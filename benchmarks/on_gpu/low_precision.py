"""The emulator on the card: the same numbers as on the CPU, and the products of torch's FP8 kernels."""

from __future__ import annotations

from typing import Any

import torch
from needs import device, say, skip

from upcycle.init.rng import generator
from upcycle.precision.quantise import quantise
from upcycle.precision.recipes import RECIPES

FP8 = (8, 9)
ACCUMULATION = 1e-2  # relative, in bfloat16
card = device()
values = torch.Generator().manual_seed(0)
x, w = torch.randn(256, 512, generator=values), torch.randn(384, 512, generator=values)
found: dict[str, Any] = {}
for name, recipe in RECIPES.items():
    for role, scaling in (("x", recipe.activation), ("W", recipe.weight), ("dy", recipe.gradient)):
        chance = recipe.stochastic and role == "dy"
        here, there = (
            quantise(each, scaling, values=generator(0, name) if chance else None) for each in (x, x.to(card))
        )
        same = torch.equal(here.numbers_RC, there.numbers_RC.cpu()) and torch.equal(here.scale_RC, there.scale_RC.cpu())
        found[f"{name} {role}"] = "as on the CPU" if same else "differs from the CPU"
if card.type == "cuda" and torch.cuda.get_device_capability(card) < FP8:
    skip(f"no FP8 on this card; {found}")
recipe = RECIPES["fp8_current"]
a, b = quantise(x.to(card), recipe.activation), quantise(w.to(card), recipe.weight)
theirs = torch._scaled_mm(
    a.numbers_RC.to(torch.float8_e4m3fn),
    b.numbers_RC.to(torch.float8_e4m3fn).T,
    scale_a=a.scale_RC[0, 0],
    scale_b=b.scale_RC[0, 0],
    out_dtype=torch.bfloat16,
)
ours = a.values_RC() @ b.values_RC().T
gap = float((theirs.float() - ours).norm() / ours.norm())
found["torch._scaled_mm"] = f"{gap:.1e} from the emulator"
say(found)
if gap > ACCUMULATION or any("differs" in each for each in found.values()):
    raise SystemExit(str(found))
