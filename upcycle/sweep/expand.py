"""From a sweep's options to its arms: names and overrides of Hydra. Pure; knows no torch."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError
from upcycle.options.arguments import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from upcycle.sweep.config import SweepConfig

BASELINE = "baseline"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the baseline; it runs once per seed.

    Attributes:
        name: unique in its sweep.
        overrides: what it changes, in Hydra's grammar.
    """

    name: str
    overrides: tuple[str, ...]


def expand(sweep: SweepConfig) -> tuple[Arm, ...]:
    """The arms in the order baseline and `vary`, `grid`, `zip`, `arms`.

    Raises:
        ConfigError: no arms or seeds, an option without values, lists to zip of different lengths, or equal names.
    """
    _check(sweep)
    short = _short_names([*sweep.vary, *sweep.grid, *sweep.zip])
    settings: list[dict[str, Any]] = [{}] if sweep.vary else []
    settings += [{option: value} for option, values in sweep.vary.items() for value in values]
    if sweep.grid:
        settings += _rows(sweep.grid, itertools.product(*sweep.grid.values()))
    if sweep.zip:
        settings += _rows(sweep.zip, zip(*sweep.zip.values(), strict=True))
    arms = [_arm(setting, short) for setting in settings]
    arms += [Arm(name=name, overrides=tuple(overrides)) for name, overrides in sweep.arms.items()]
    repeated = [name for name, count in Counter(arm.name for arm in arms).items() if count > 1]
    if repeated:
        raise ConfigError("two arms have the same name", found=", ".join(repeated), remedy="leave one of them out")
    return tuple(arms)


def literal(value: object) -> str:
    """A value as Hydra's grammar writes it."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    return "null" if value is None else str(value).lower()


def _check(sweep: SweepConfig) -> None:
    for form in ("vary", "grid", "zip"):
        empty = [option for option, values in getattr(sweep, form).items() if not values]
        if empty:
            raise ConfigError(f"sweep.{form} has an option without values", found=", ".join(empty))
    lengths = {option: len(values) for option, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{option}: {length}" for option, length in lengths.items())
        raise ConfigError("sweep.zip needs as many values of each option", found=found)
    if not (sweep.vary or sweep.grid or sweep.zip or sweep.arms):
        raise ConfigError(
            "the sweep has no arms", found="none", expected="sweep.vary, sweep.grid, sweep.zip or sweep.arms"
        )
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError("sweep.seeds must name different seeds, at least one", found=sweep.seeds)
    for name, valid, expected in (
        ("retries", sweep.retries >= 0, "0 or more"),
        ("flops_per_second", sweep.flops_per_second > 0, "above 0"),
    ):
        if not valid:
            raise ConfigError(f"sweep.{name} is out of range", found=getattr(sweep, name), expected=expected)


def _rows(options: Mapping[str, Any], rows: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(options, row, strict=True)) for row in rows]


def _short_names(options: Iterable[str]) -> dict[str, str]:
    """Last parts of options' names, where they are not ambiguous."""
    options = set(options)
    ends = Counter(option.rpartition(".")[2] for option in options)
    return {option: option.rpartition(".")[2] if ends[option.rpartition(".")[2]] == 1 else option for option in options}


def _arm(setting: Mapping[str, Any], short: Mapping[str, str]) -> Arm:
    shown = {option: _shown(value) for option, value in setting.items()}
    return Arm(
        name=" ".join(f"{short[option]}={value}" for option, value in shown.items()) or BASELINE,
        overrides=tuple(f"{option}={literal(value)}" for option, value in setting.items()),
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else literal(value)
