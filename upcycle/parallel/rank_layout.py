"""How many ranks share what: checks a layout against the ranks that are there and against the model. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.config import ParallelConfig

OPTIONS = ("replicate", "fsdp", "tp", "ep")


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """A layout of `replicate * fsdp * tp` ranks; see `ParallelConfig`."""

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.fsdp * self.tp

    @property
    def replica(self) -> int:
        """Ranks of one replica."""
        return self.fsdp * self.tp

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.fsdp

    def __str__(self) -> str:
        return f"replicate={self.replicate}, fsdp={self.fsdp}, tp={self.tp}, ep={self.ep}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a layout cannot be: as in `UpcycleError`."""

    what: str
    found: str
    expected: str

    def error(self, remedy: str) -> ConfigError:
        return ConfigError(self.what, found=self.found, expected=self.expected, remedy=remedy)


def resolve(config: ParallelConfig, ranks: int) -> RankLayout:
    """Fill in what `parallel.*` leaves open.

    Args:
        config: the options.
        ranks: processes that were started.

    Raises:
        ConfigError: no layout of these options has that many ranks, or experts cannot be spread over them.
    """
    for name in OPTIONS:
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ConfigError(f"parallel.{name} is out of range", found=size, expected="1 or more")
    replicate, tp = config.replicate or 1, config.tp or 1
    step = replicate * tp * (config.fsdp or 1)
    if ranks % step or (config.fsdp and ranks != step):
        below = ranks // step * step
        fitting = [step] if config.fsdp else [size for size in (below, below + step) if size]
        raise ConfigError(
            "no layout of these options has that many ranks",
            found=f"{ranks} ranks for replicate={replicate}, fsdp={config.fsdp}, tp={tp}",
            expected=" or ".join(f"{size}" for size in fitting) + " ranks",
            remedy=_remedy(config, ranks),
        )
    fsdp = config.fsdp or ranks // step
    layout = RankLayout(replicate=replicate, fsdp=fsdp, tp=tp, ep=config.ep or fsdp * tp)
    if problem := _of_ranks(layout):
        raise problem.error(_remedy(config, ranks))
    return layout


def check_heads(layout: RankLayout, heads: int, experts: int | None = None) -> None:
    """Check that tensor parallelism can give every rank whole heads of keys and values.

    Args:
        layout: of the ranks.
        heads: of keys and values.
        experts: of the model, for the remedy; None for a dense one.

    Raises:
        ConfigError: it cannot.
    """
    if problem := _of_heads(layout, heads):
        raise problem.error(_remedy(layout, layout.ranks, experts=experts, heads=heads))


def check_experts(layout: RankLayout, experts: int) -> None:
    """Check that a model's experts can be laid out.

    Raises:
        ConfigError: naming the options that would do.
    """
    if problem := _of_experts(layout, experts):
        # What divides tp divides the heads that it divides.
        raise problem.error(_remedy(layout, layout.ranks, experts=experts, heads=layout.tp))


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    return [way for way in range(1, number + 1) if number % way == 0]


def rank_layouts(ranks: int, *, experts: int | None, heads: int | None) -> Iterator[RankLayout]:
    """Every layout of so many ranks that the model allows; there is always one, of nothing but replicas.

    Args:
        ranks: how many.
        experts: of the model; None asks nothing of them.
        heads: of keys and values; None asks nothing of them.
    """
    for replicate in divisors(ranks):
        for tp in divisors(ranks // replicate):
            fsdp = ranks // replicate // tp
            for ep in divisors(fsdp * tp):
                layout = RankLayout(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
                problem = _of_ranks(layout)
                problem = problem or (_of_heads(layout, heads) if heads else None)
                problem = problem or (_of_experts(layout, experts) if experts else None)
                if not problem:
                    yield layout


def _of_ranks(layout: RankLayout) -> Problem | None:
    if layout.ep > 1 and (layout.replica % layout.ep or layout.ep % layout.tp):
        return Problem(
            what="parallel.ep does not fit the ranks of a replica",
            found=f"ep={layout.ep} of fsdp * tp = {layout.replica} ranks, tp={layout.tp}",
            expected="a multiple of tp that divides fsdp * tp",
        )
    return None


def _of_heads(layout: RankLayout, heads: int) -> Problem | None:
    if heads % layout.tp:
        return Problem(
            what="parallel.tp does not divide the heads of keys and values",
            found=f"tp={layout.tp}, {heads} heads",
            expected=f"a divisor of {heads}",
        )
    return None


def _of_experts(layout: RankLayout, experts: int) -> Problem | None:
    if layout.tp > 1 and layout.ep == 1:
        return Problem(
            what="tensor parallelism does not split experts, whose matrices are stacked",
            found=f"tp={layout.tp}, ep=1",
            expected="experts spread over a multiple of tp ranks",
        )
    if layout.replica > experts:
        return Problem(
            what="experts are sharded whole, and there are more ranks than experts in a replica",
            found=f"fsdp * tp = {layout.replica}, {experts} experts",
            expected=f"fsdp * tp of at most {experts}",
        )
    if experts % layout.ep:
        return Problem(
            what="parallel.ep does not divide the number of experts",
            found=f"ep={layout.ep}, {experts} experts",
            expected=f"a divisor of {experts}",
        )
    return None


def _remedy(
    asked: ParallelConfig | RankLayout, ranks: int, *, experts: int | None = None, heads: int | None = None
) -> str:
    """The options that differ in the nearest layout: in its replicas, then its TP, then its EP, the larger of two."""

    def distance(layout: RankLayout) -> tuple[float, ...]:
        wanted = asked.replicate or 1, asked.tp or 1, asked.ep or layout.replica
        found = layout.replicate, layout.tp, layout.ep
        return *(max(pair) / min(pair) for pair in zip(wanted, found, strict=True)), -layout.ep

    chosen = min(rank_layouts(ranks, experts=experts, heads=heads), key=distance)
    # What is null follows from the others.
    follows = {"replicate": 1, "fsdp": chosen.fsdp, "tp": 1, "ep": chosen.replica}
    named = ((name, getattr(chosen, name)) for name in OPTIONS)
    changed = [f"parallel.{n}={size}" for n, size in named if size != (getattr(asked, n) or follows[n])]
    return f"set {' '.join(changed)}"
