"""Global-batch statistics and the bias update in two processes, against all their tokens in one."""

from __future__ import annotations

import torch
from ranks import work
from routers import EXPERTS, router, tokens
from torch import multiprocessing


def test_two_ranks_balance_as_one(tmp_path):
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    made = router().eval()
    load = torch.zeros(EXPERTS)
    for micro in range(2):
        outputs = [made(tokens(20 + 10 * rank, seed=2 * rank + micro)) for rank in range(2)]
        load += sum(experts.flatten().bincount(minlength=EXPERTS) for _, _, experts in outputs)
        for rank, (logits, _, _) in enumerate(outputs):
            expected = EXPERTS * (load / load.sum() * logits.softmax(-1).mean(0)).sum().detach()
            torch.testing.assert_close(found[rank]["losses"][micro], expected, rtol=1e-6, atol=1e-6)
    for rank in range(2):
        assert torch.equal(found[rank]["bias"], 0.1 * torch.sign(load.mean() - load))
