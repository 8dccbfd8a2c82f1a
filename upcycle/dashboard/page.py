"""The report: one HTML file that needs nothing but a browser."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.dashboard.findings import CONFIDENCE, SMALLEST_PERCENT, choose_baseline, find
from upcycle.dashboard.panels import SECTIONS
from upcycle.dashboard.records import read_place
from upcycle.dashboard.tables import provenance, run_rows, unit_of
from upcycle.errors import OutputError
from upcycle.files.durable import write_text
from upcycle.options.extras import need
from upcycle.tracking.status import FINISHED

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from plotly.graph_objects import Figure

    from upcycle.dashboard.charts import Style
    from upcycle.dashboard.config import ReportConfig
    from upcycle.dashboard.panels import Section
    from upcycle.dashboard.records import Records

TEMPLATE = "report.html.jinja"
DEFAULT_NAME = "report.html"
DEFAULT_METRIC = "val/loss"
# Bar of buttons: saving a picture, zooming back; no link to plotly's site.
CHART_OPTIONS = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
}
HEAT_MAP_CAPTION = "times the mean load of its layer, in the run of the first seed"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure on the page.

    Attributes:
        title: above it.
        caption: what is measured.
        html: the figure.
    """

    title: str
    caption: str
    html: str


def write_report(config: ReportConfig) -> Path:
    """Write the report of a sweep, finished or not, or of other runs.

    Returns:
        The file.

    Raises:
        ConfigError: nothing names the arms.
        MissingPackageError: plotly or jinja2 is not installed.
        RecordError: no runs, an unknown sweep, arm or metric, or damaged records.
        OutputError: the file cannot be written.
    """
    need("the report", "plotly", "jinja2")
    runs = Path(config.runs).expanduser()
    output = Path(config.output).expanduser() if config.output else runs / DEFAULT_NAME
    if output.is_dir():
        raise OutputError("the output is a directory", found=output, expected="a file", remedy="add a file's name")
    records = read_place(runs, name=config.name, arms=config.arms)
    write_text(output, _page(records, config))
    return output


def _page(records: Records, config: ReportConfig) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    from upcycle.dashboard.charts import draw_differences, styles

    metric = config.metric or records.metric or DEFAULT_METRIC
    baseline = choose_baseline(records.arms, config.baseline)
    findings = find(records.rows, records.arms, baseline=baseline, metric=metric, allow=config.allow)
    looks = styles(records.arms, baseline)
    differences = draw_differences(findings, looks, metric=metric)
    sections = {section.title: _charts(records.rows, section, looks) for section in SECTIONS}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["p"] = lambda p: "below 0.001" if p < 0.001 else f"{p:.2g}"
    return environment.get_template(TEMPLATE).render(
        records=records,
        metric=metric,
        unit=unit_of(metric),
        baseline=baseline,
        findings=findings,
        looks=looks,
        differences=_html(differences, "differences") if differences else None,
        sections={title: charts for title, charts in sections.items() if charts},
        runs=run_rows(records, metric),
        finished=FINISHED,
        provenance=provenance(records),
        confidence=CONFIDENCE,
        smallest=SMALLEST_PERCENT,
        plotly=get_plotlyjs(),
    )


def _charts(rows: pd.DataFrame, section: Section, looks: Mapping[str, Style]) -> list[Chart]:
    """The charts of a section that some run has data for."""
    from upcycle.dashboard.charts import draw_heat_maps, draw_lines

    charts = []
    for panel in section.panels:
        name = f"{panel.metric}-{panel.against}"
        if panel.kind == "heat map":
            for arm, figure in draw_heat_maps(rows, panel, looks).items():
                html = _html(figure, f"{name}-{looks[arm].index}")
                charts.append(Chart(title=f"{panel.title}: {arm}", caption=HEAT_MAP_CAPTION, html=html))
        elif figure := draw_lines(rows, panel, looks):
            charts.append(Chart(title=panel.title, caption=panel.meaning, html=_html(figure, name)))
    return charts


def _html(figure: Figure, name: str) -> str:
    """The figure, under a name of its own, so that the same records make the same page."""
    options = {"full_html": False, "include_plotlyjs": False, "config": CHART_OPTIONS}
    return str(figure.to_html(div_id=re.sub(r"\W+", "-", name), **options))
