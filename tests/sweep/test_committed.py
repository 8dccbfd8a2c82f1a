"""What is composed today: the directories of the committed runs, and options that depend on the scale."""

from __future__ import annotations

import re
import shlex

import pytest
import questions

from upcycle.sweep.index import read_indexes
from upcycle.sweep.plan import directory_name

INDEXES = read_indexes(questions.ROOT / "analysis/results/laptop")


def campaign() -> dict[str, list[str]]:
    """The sweeps that `make campaign` runs, and how."""
    makefile = (questions.ROOT / "Makefile").read_text().replace("\\\n", " ")
    lists = dict(re.findall(r"^([A-Z]+) := (.*)$", makefile, flags=re.MULTILINE))
    found = {}
    for names, line in re.findall(r"for sweep in \$\(([A-Z]+)\); do .*?\+sweeps=\$\$sweep (.*?);", makefile):
        given = [each for each in shlex.split(line) if not each.startswith(("output=", "hydra"))]
        found |= dict.fromkeys(lists[names].split(), given)
    return found


def test_every_index_is_of_the_campaign() -> None:
    assert set(INDEXES) <= set(campaign())


@pytest.mark.parametrize("name", INDEXES)
def test_committed_runs_are_found_again(name: str) -> None:
    """Another option, or another default, in the options of training would give every run another directory."""
    configs = questions.configs(name, *campaign()[name])
    runs = INDEXES[name]["runs"]
    assert runs
    assert runs.keys() == {directory_name(configs[each["arm"]], each["seed"]) for each in runs.values()}


@pytest.mark.parametrize(("scale", "sequences"), [("smoke", 1), ("laptop", 4), ("smollm2", 8), ("paper", 1)])
def test_micro_batches_are_those_of_the_scale(scale: str, sequences: int) -> None:
    configs = questions.configs("balance_statistics", f"scale={scale}")
    assert {config.batch.micro for config in configs.values()} == {sequences}
