"""The door of objectives: what the Lightning module and its callbacks ask of one.

Shapes: B samples, S tokens of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.data import Dataset
    from transformers import PreTrainedModel

    from upcycle.data.order import SampleOrder
    from upcycle.distributed.ranks import Ranks
    from upcycle.train.config import TrainConfig
    from upcycle.train.start import Start

Batch = dict[str, Tensor]
Row = dict[str, float]
LOSS = "loss"


class Samples(Protocol):
    """What an objective trains on, such as a `Corpus`."""

    @property
    def train(self) -> Dataset[Batch]: ...

    @property
    def held_out(self) -> Mapping[str, Any]: ...

    @property
    def hash(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def documents(self) -> int: ...

    def order(self, seed: int) -> SampleOrder: ...


class Objective(Protocol):
    """What training minimises, and how it is measured. Balancing of experts comes on top, whatever it is."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """`LOSS`, a mean over samples of which each counts the same, is minimised; other parts are for `row`."""

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch that are not padding."""

    def row(self, parts: dict[str, float]) -> Row:
        """The metrics of the record that means of `loss`'s other parts are; takes them out of `parts`."""

    def held_out(self, model: PreTrainedModel, *, batch_size: int, samples: int | None, ranks: Ranks) -> Row:
        """Metrics on held-out samples, at most so many of each domain; `criterion` among them.

        Args:
            model: left in the mode that it was in.
            batch_size: samples per forward pass.
            samples: of each domain, from the first; None takes all.
            ranks: the processes over which the model is laid out; each measures its share.
        """

    @property
    def criterion(self) -> str:
        """The metric of `held_out` whose lowest value is the best checkpoint's."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An objective by name: what is done before there is a model, and then with it.

    Attributes:
        attributes: what the reward head that it trains scores; None for a causal language model.
        check: raises ConfigError for options that it cannot take.
        samples: reads the data.
        make: the objective itself.
    """

    attributes: Callable[[TrainConfig], tuple[str, ...] | None]
    check: Callable[[TrainConfig], None]
    samples: Callable[[TrainConfig, Start], Any]
    make: Callable[[TrainConfig, Start, Any], Objective]


def model_inputs(batch: Batch) -> Batch:
    """What the model is called with: everything but the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}
