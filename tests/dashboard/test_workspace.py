"""The W&B workspace: what is in it, read back through wandb-workspaces, and how it gets to a server."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces.internal import View
from written import config

from upcycle.dashboard.command import naming_options
from upcycle.dashboard.panels import SECTIONS
from upcycle.dashboard.workspace import as_json, build_workspace, push
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome
    from wandb_server import Server

pytest_plugins = ("tiny",)
SOURCE = Path(__file__).parent.parent.parent / "models/stdlib-250k"
SHIPPED = ("dashboard", "+sweeps=router_order", "scale=smoke", f"source={SOURCE}")
PANELS = [panel for section in SECTIONS for panel in section.panels]


def build(**changes: Any) -> ws.Workspace:
    given: dict[str, Any] = {
        "entity": "lab",
        "project": "moe",
        "group": "order",
        "options": ["moe.router_order", "init.scaling"],
        "metric": "val/loss",
        "layers": (0, 2),
        "texts": {"question": "Which?", "published": "nothing"},
    }
    return build_workspace("order", **given | changes)


def read_back(text: str) -> ws.Workspace:
    """What the server's copy is to wandb-workspaces, whose models refuse what they do not know."""
    view = json.loads(text)
    assert View.model_validate(view).model_dump(by_alias=True, exclude_none=True) == view
    return ws.Workspace._from_model(View.model_validate(view))


def test_a_section_for_each_theme_and_a_plot_for_each_panel() -> None:
    found = read_back(as_json(build()))
    about, *themes = found.sections
    assert about.panels[0].markdown.startswith("**Question.** Which?\n\n**Published.** nothing\n\n")
    assert [section.name for section in themes] == [section.title for section in SECTIONS]
    plots = {plot.title: plot for section in themes for plot in section.panels}
    for panel in PANELS:
        if panel.kind == "lines":
            plot = plots.pop(panel.title)
            assert ([each.name for each in plot.y], plot.x.name) == ([panel.metric], panel.against)
            assert (plot.title_x, plot.title_y) == (panel.x_title, panel.unit or None)
            assert (plot.groupby_aggfunc, plot.groupby_rangefunc) == ("mean", "minmax")
    assert [plot.y[0].name for plot in plots.values()] == ["moe/layer_0/load", "moe/layer_2/load"]
    assert list(plots) == ["Load of each expert, layer 0", "Load of each expert, layer 2"]


def test_losses_stand_against_tokens_and_flops() -> None:
    assert {panel.against for panel in PANELS if panel.metric == "val/loss"} == {"train/tokens", "train/flops"}
    assert not [title for title, count in Counter(panel.title for panel in PANELS).items() if count > 1]


def test_runs_of_the_group_by_arm() -> None:
    found = read_back(as_json(build()))
    assert (found.entity, found.project, found.name) == ("lab", "moe", "order")
    assert "order" in str(found.runset_settings.filters)
    assert [group.name for group in found.runset_settings.groupby] == ["config.moe.router_order", "config.init.scaling"]
    assert "summary:val/loss" in found.runset_settings.pinned_columns


@pytest.mark.parametrize("group", ["it's", 'say "order"', "a == b and c", "lr=0.1", "back\\slash", "a in (b) < c"])
def test_any_name_of_a_group_is_taken_literally(group: str) -> None:
    (run_set,) = json.loads(as_json(build(group=group)))["spec"]["section"]["runSets"]
    (only,) = run_set["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", group)


def test_arms_are_told_apart_by_few_options() -> None:
    grid = [
        replace(config(f"init.scaling={scaling}", f"moe.router_order={order}"), seed=seed)
        for seed, (scaling, order) in enumerate(
            [("exact", "softmax_topk"), ("none", "softmax_topk"), ("none", "topk_softmax")]
        )
    ]
    assert naming_options(grid, first=["init.scaling"]) == ["init.scaling", "moe.router_order"]
    assert naming_options(grid[:2], first=[]) == ["init.scaling"]
    assert naming_options(grid[:1], first=[]) == []
    presets = [config("init=copy"), config("init=drop")]
    assert naming_options(presets, first=["init"]) == ["init.name"]


def test_the_command_prints_or_writes_what_is_valid(upcycle: Callable[..., Outcome], tmp_path: Path) -> None:
    printed = upcycle(*SHIPPED)
    assert printed.status == 0, printed.err
    found = read_back(printed.out)
    grouped = [group.name.removeprefix("config.") for group in found.runset_settings.groupby]
    assert grouped == ["init.scaling", "moe.router_order", "moe.top_k"]
    assert "router_order" in str(found.runset_settings.filters)
    about, *themes = found.sections
    assert "Softmax before or after" in about.panels[0].markdown
    plots = [plot.title for section in themes for plot in section.panels]
    assert [title for title in plots if "layer" in title] == [f"Load of each expert, layer {layer}" for layer in (0, 1)]
    written = upcycle(*SHIPPED, f"output={tmp_path / 'view.json'}", "wandb.group=mine", "wandb.project=theirs")
    assert written.out == ""
    found = read_back((tmp_path / "view.json").read_text())
    assert found.project == "theirs"
    assert "mine" in str(found.runset_settings.filters)


def test_what_the_command_needs(upcycle: Callable[..., Outcome]) -> None:
    upcycle("dashboard", "scale=smoke").refused("there is no sweep", remedy="+sweeps=NAME")
    upcycle("dashboard", "sweeps/router_ordr", "scale=smoke").refused(
        "unknown value for sweeps", found="router_ordr", remedy="router_order"
    )


@pytest.mark.parametrize("name", ["sweeps/layers", "sweeps/layers.yaml"])
def test_a_file_of_sweeps_is_its_name(name: str, upcycle: Callable[..., Outcome]) -> None:
    given = ("scale=smoke", f"source={SOURCE}")
    about = read_back(upcycle("dashboard", name, *given).out).sections[0]
    assert "Do all layers have to become" in about.panels[0].markdown
    assert "sweep layers" in upcycle("plan-sweep", name, *given).out
    upcycle("dashboard", "layers", "scale=smoke").refused("cannot read an argument", found="layers")


def keep_views(server: Server) -> list[dict[str, Any]]:
    """Have the server take workspaces; what it is sent."""
    views: list[dict[str, Any]] = []

    def upsert(variables: dict[str, Any]) -> dict[str, Any]:
        views.append(variables)
        return {"upsertView": {"view": {"id": "view", "name": variables["name"]}, "inserted": True}}

    server.UpsertView2 = upsert  # type: ignore[attr-defined]
    return views


def test_a_workspace_is_sent_to_a_server(server: Server, upcycle: Callable[..., Outcome]) -> None:
    """By the real client, to the account's own entity if none is named."""
    views = keep_views(server)
    sent = upcycle(*SHIPPED, "push=true")
    (view,) = views
    short = view["name"].removeprefix("nw-").removesuffix("-v")
    assert (sent.status, sent.out) == (0, f"{server.url}/lab/upcycle?nw={short}\n")
    assert (view["entityName"], view["projectName"], view["type"]) == ("lab", "upcycle", "project-view")
    names = [each["name"] for each in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]]
    assert names == ["Question", *(section.title for section in SECTIONS)]


def test_a_wrong_key_and_a_server_that_is_down_are_said_in_a_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, upcycle: Callable[..., Outcome]
) -> None:
    server.status = 401
    refused = upcycle(*SHIPPED, "push=true")
    refused.refused("W&B did not take the workspace: ")
    assert refused.out == ""
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 2)  # seconds, of 19
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port, where nothing listens
    wandb.teardown()
    with pytest.raises(RecordError, match="W&B did not take the workspace: .") as error:
        push(build())
    assert "\n" not in str(error.value)
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    with pytest.raises(RecordError, match=r"W&B did not take the workspace: .*(key|auth|login)"):
        push(build())
