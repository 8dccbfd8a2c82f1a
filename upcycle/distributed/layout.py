"""How many ranks share what: checks a layout against the ranks that are there and against the model. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from upcycle.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of `replicate * fsdp * tp` ranks; see `ParallelConfig`."""

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.fsdp * self.tp

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.fsdp

    def __str__(self) -> str:
        return f"replicate={self.replicate}, fsdp={self.fsdp}, tp={self.tp}, ep={self.ep}"


def resolve(config: ParallelConfig, ranks: int) -> Layout:
    """Fill in what `parallel.*` leaves open.

    Args:
        config: the options.
        ranks: processes that were started.

    Raises:
        ConfigError: no layout of these options has that many ranks, or experts cannot be spread over them.
    """
    sizes = {"fsdp": config.fsdp, "tp": config.tp, "ep": config.ep, "replicate": config.replicate}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"parallel.{name} is out of range", found=size, expected="1 or more")
    step = config.replicate * config.tp * (config.fsdp or 1)
    if ranks % step or (config.fsdp and ranks != step):
        below = ranks // step * step
        fitting = [step] if config.fsdp else [size for size in (below, below + step) if size]
        raise ConfigError(
            "no layout of these options has that many ranks",
            found=f"{ranks} ranks for replicate={config.replicate}, fsdp={config.fsdp}, tp={config.tp}",
            expected=" or ".join(f"{size}" for size in fitting) + " ranks",
            remedy=f"have {fitting[-1]} of them, or change parallel.*",
        )
    fsdp = config.fsdp or ranks // step
    ep = fsdp * config.tp if config.ep is None else config.ep
    if ep > 1 and (fsdp * config.tp % ep or ep % config.tp):
        raise ConfigError(
            "parallel.ep does not fit the ranks of a replica",
            found=f"ep={ep} of fsdp * tp = {fsdp * config.tp} ranks, tp={config.tp}",
            expected="a multiple of tp that divides fsdp * tp",
            remedy=f"set parallel.ep={fsdp * config.tp}",
        )
    return Layout(replicate=config.replicate, fsdp=fsdp, tp=config.tp, ep=ep)


def check_heads(layout: Layout, heads: int) -> None:
    """Check that tensor parallelism can give every rank whole heads of keys and values.

    Raises:
        ConfigError: it cannot.
    """
    if heads % layout.tp:
        raise ConfigError(
            "parallel.tp does not divide the heads of keys and values",
            found=f"tp={layout.tp}, {heads} heads",
            expected=f"a divisor of {heads}",
            remedy="set parallel.tp=1, or another divisor",
        )


def check_experts(layout: Layout, experts: int) -> None:
    """Check that a model's experts can be laid out.

    Raises:
        ConfigError: naming the option.
    """
    replica = layout.fsdp * layout.tp
    if layout.tp > 1 and layout.ep == 1:
        raise ConfigError(
            "tensor parallelism does not split experts, whose matrices are stacked",
            found=f"tp={layout.tp}, ep=1",
            remedy=f"spread the experts over the ranks with parallel.ep={replica}",
        )
    if replica > experts:
        raise ConfigError(
            "experts are sharded whole, and there are more ranks than experts in a replica",
            found=f"fsdp * tp = {replica}, {experts} experts",
            expected=f"fsdp * tp of at most {experts}",
            remedy=f"add replicas: parallel.replicate={-(-layout.ranks // experts)}",
        )
    if experts % layout.ep:
        fitting = [size for size in range(1, replica + 1) if not (replica % size or experts % size)]
        raise ConfigError(
            "parallel.ep does not divide the number of experts",
            found=f"ep={layout.ep}, {experts} experts",
            expected=", ".join(map(str, fitting)),
            remedy=f"set parallel.ep={fitting[-1]}",
        )
