"""The declaration of the panels fits the schema, and needs nothing else."""

from __future__ import annotations

import subprocess
import sys

from upcycle.dashboard.panels import SECTIONS, STEP
from upcycle.tracking.schema import METRICS

PANELS = [panel for section in SECTIONS for panel in section.panels]


def test_every_panel_is_of_the_schema() -> None:
    units = {metric.name: metric.unit for metric in METRICS}
    for panel in PANELS:
        assert panel.unit == units[panel.metric].replace("1", "")
        assert panel.against == STEP or panel.against in units
        assert ("{layer}" in panel.metric) is (panel.kind == "heat map")
        assert panel.meaning
        assert panel.x_title


def test_what_matters_for_a_mixture_is_there() -> None:
    shown = {panel.metric for panel in PANELS}
    moe = {"max_vio", "load_entropy", "dead_experts", "dropped_share", "router_entropy", "dense_cosine", "group_cosine"}
    assert {f"moe/{name}" for name in moe} | {"moe/layer_{layer}/load"} <= shown
    assert {f"train/{name}" for name in ("tokens_per_second", "step_seconds", "learning_rate", "grad_norm")} <= shown


def test_it_is_light() -> None:
    code = "import sys, upcycle.dashboard.panels, upcycle.dashboard.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "plotly", "wandb", "jinja2"} & set(loaded)
