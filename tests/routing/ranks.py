"""What each of two processes does for test_routing_ranks.py."""

from __future__ import annotations

from pathlib import Path

import torch
from routers import EXPERTS, router, routing, tokens
from torch import distributed


def work(rank: int, directory: str) -> None:
    """Route this rank's tokens, and save the losses, the loads and the bias."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    made = router(bias=torch.zeros(EXPERTS))
    both = routing(made, aux_loss=1.0, statistics="global_batch", bias_update=0.1)
    losses = []
    for micro in range(2):
        made(tokens(20 + 10 * rank, seed=2 * rank + micro))
        losses.append(both.losses(0).aux.detach())
    both.end_step(0)
    torch.save({"losses": losses, "bias": made.e_score_correction_bias}, Path(directory) / f"{rank}.pt")
    distributed.destroy_process_group()
