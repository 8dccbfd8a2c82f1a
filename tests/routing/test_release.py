"""What lets groups go keeps the experts' weight, where there is one to keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from upcycle.errors import TrainingError
from upcycle.routing.release import rescale


@pytest.mark.parametrize(("before", "after", "factor"), [(3.0, 2.0, 1.5), (0.0, 0.0, 1.0), (0.0, 2.0, 1.0)])
def test_the_factor(before: float, after: float, factor: float) -> None:
    """No weight before says nothing about the experts, which keep theirs."""
    experts = nn.ParameterDict({"down_proj": torch.ones(2), "up_proj": torch.ones(2)})
    router = SimpleNamespace(masses=torch.tensor([before, after], dtype=torch.float64))
    assert rescale(router, experts) == factor  # type: ignore[arg-type]
    assert experts["down_proj"].tolist() == [factor] * 2
    assert experts["up_proj"].tolist() == [1.0] * 2


def test_no_weight_after() -> None:
    experts = nn.ParameterDict({"down_proj": torch.ones(2)})
    router = SimpleNamespace(masses=torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(TrainingError, match=r"no weight once their groups are let go(.|\n)*router.release=null"):
        rescale(router, experts)  # type: ignore[arg-type]
    assert experts["down_proj"].tolist() == [1.0] * 2
