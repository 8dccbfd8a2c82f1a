"""The panels as a W&B workspace, by wandb-workspaces: validated without a server, and sent to one.

A list of values per expert is a histogram in W&B (`tracking.wandb_mirror`), which a line plot draws as a heat map over
the steps of one run: runs have to be looked at one by one for it, and are not averaged.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.dashboard.panels import SECTIONS, STEP
from upcycle.errors import RecordError
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wandb_workspaces.workspaces import Workspace

    from upcycle.dashboard.panels import Panel, Section

LINES_SHOWN = 50  # W&B draws 10 unless told
COLUMNS = 3
HEAT_MAPS = "W&B does not average heat maps over runs: select one run to see its expert load."
OPTIONS = "config"  # where the options stand in the config of a W&B run, which is what run.json holds


def build_workspace(
    name: str,
    *,
    entity: str | None,
    project: str,
    group: str,
    options: Sequence[str],
    metric: str,
    layers: tuple[int, ...],
    texts: Mapping[str, str],
) -> Workspace:
    """The workspace of a sweep: its runs alone, a line per arm with the range over seeds, a section per theme.

    Args:
        name: what W&B calls it.
        entity: whose the project is; None is the account's default, which is filled in when it is sent.
        project: of the runs.
        group: W&B group of the runs.
        options: paths of the options whose values name an arm together.
        metric: what the sweep compares; it has its column in the list of runs.
        layers: indices of the MoE layers of all arms.
        texts: what is said about the sweep, by title.

    Raises:
        MissingPackageError: wandb-workspaces is not installed.
    """
    need("the workspace", "wandb_workspaces")
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=name,
        sections=[_about(texts), *(_section(section, layers) for section in SECTIONS)],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=LINES_SHOWN),
        runset_settings=ws.RunsetSettings(
            filters=f'Metric("Group") == "{_spelt(group)}"',
            groupby=[ws.Config(f"{OPTIONS}.{option}") for option in options],
            pinned_columns=[f"summary:{metric}", "summary:status"],
        ),
    )


def push(workspace: Any) -> str:
    """Send a workspace to the server that the client of W&B is set up for.

    Returns:
        Its URL.

    Raises:
        RecordError: the workspace is not at the server, such as for want of a key or of a connection.
    """
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        workspace.entity = workspace.entity or str(wandb.Api().default_entity)
        return str(workspace.save().url)
    except Exception as error:  # W&B's client raises what its parts raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(f"W&B did not take the workspace: {reason}") from error


def as_json(workspace: Workspace) -> str:
    """What the server would be sent, validated by wandb-workspaces' own models."""
    view = workspace._to_model()
    return str(view.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def _spelt(text: str) -> str:
    """The text as code points: wandb-workspaces doubles = and reads < as <= within the strings of a filter too."""
    return "".join(f"\\U{ord(letter):08x}" for letter in text)


def _about(texts: Mapping[str, str]) -> Any:
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import MarkdownPanel

    parts = [f"**{title.capitalize()}.** {' '.join(text.split())}" for title, text in texts.items()]
    layout = ws.SectionLayoutSettings(columns=1, rows=1)
    panels: list[Any] = [MarkdownPanel(markdown="\n\n".join([*parts, HEAT_MAPS]))]
    return ws.Section(name="Question", panels=panels, is_open=True, layout_settings=layout)


def _section(section: Section, layers: tuple[int, ...]) -> Any:
    import wandb_workspaces.workspaces as ws

    plots = [plot for panel in section.panels for plot in _plots(panel, layers)]
    layout = ws.SectionLayoutSettings(columns=COLUMNS, rows=-(-len(plots) // COLUMNS))
    return ws.Section(name=section.title, panels=plots, is_open=True, layout_settings=layout)


def _plots(panel: Panel, layers: tuple[int, ...]) -> list[Any]:
    """A plot, or one per layer."""
    from wandb_workspaces.reports.v2.interface import LinePlot

    if panel.kind == "heat map":
        titles = {panel.of_layer(layer): f"{panel.title}, layer {layer}" for layer in layers}
    else:
        titles = {panel.metric: panel.title}
    return [
        LinePlot(
            title=title,
            x=panel.against,
            y=[metric],
            title_x=panel.x_title,
            title_y=panel.unit or None,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for metric, title in titles.items()
    ]
