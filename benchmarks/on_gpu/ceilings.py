"""What the card can do at most: a large product in bfloat16, and a copy."""

from __future__ import annotations

import torch
from needs import device, milliseconds, say

card = device()
SIZE, BYTES = (8192, 2**31) if card.type == "cuda" else (64, 2**16)
a, b = (torch.randn(SIZE, SIZE, device=card, dtype=torch.bfloat16) for _ in range(2))
product = milliseconds(lambda: a @ b)
source = torch.empty(BYTES, dtype=torch.uint8, device=card)
target = torch.empty_like(source)
copy = milliseconds(lambda: target.copy_(source))
say({"bf16_tflops": 2 * SIZE**3 / product / 1e9, "copy_tb_per_second": 2 * BYTES / copy / 1e9})
