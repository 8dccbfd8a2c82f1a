"""The committed records of the campaign: whole, under their own names, and comparable."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from upcycle.analysis import load_runs
from upcycle.sweep.index import read_indexes
from upcycle.sweep.plan import HASH_LENGTH, NOT_COMPARED
from upcycle.tracking.packs import packs_in, run_texts
from upcycle.tracking.versions import recorded, upgraded

ROOT = Path(__file__).parent.parent
LAPTOP = ROOT / "analysis/results/laptop"
TEXTS = {name: text for file in packs_in(LAPTOP) for name, text in run_texts(file).items()}
INDEXES = read_indexes(LAPTOP)


def by_source() -> dict[str, set[str]]:
    """The packed runs of sweeps about one model, which they name themselves or the scale gives them."""
    found = defaultdict[str, set[str]](set)
    for name, index in INDEXES.items():
        source = OmegaConf.to_container(OmegaConf.load(ROOT / f"sweeps/{name}.yaml")).get("source", "the scale's")
        found[source] |= index["runs"].keys() & TEXTS.keys()
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_a_run_is_named_by_its_options(name: str) -> None:
    config = recorded(upgraded(json.loads(TEXTS[name])["config"]))
    compared = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    assert hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH] == name


def test_every_run_is_finished_and_belongs_to_a_sweep() -> None:
    assert TEXTS
    assert {run for index in INDEXES.values() for run in index["runs"]} >= TEXTS.keys()
    assert {json.loads(text)["status"] for text in TEXTS.values()} == {"finished"}


def test_every_run_is_in_one_pack_and_in_the_frame() -> None:
    assert len(TEXTS) == sum(len(run_texts(file)) for file in packs_in(LAPTOP))
    assert {f"{LAPTOP / name}" for name in TEXTS} <= set(load_runs(LAPTOP)["run"].astype(str))


@pytest.mark.parametrize("source", by_source())
def test_all_runs_of_a_source_share_it_and_text_and_order(source: str) -> None:
    runs = load_runs(*(LAPTOP / name for name in sorted(by_source()[source])))
    assert runs["data_hash"].nunique() == 1
    assert runs["source_hash"].dropna().nunique() == 1
    assert (runs.groupby("seed")["order_hash"].nunique() == 1).all()
