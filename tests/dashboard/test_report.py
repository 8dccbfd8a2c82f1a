"""The report's content: what the records say, whatever state the sweep is in and whatever its arms are called."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import questions
from sweeps import ENDS, EXPERTS, HOSTILE, LAYERS, TEXTS, change, write_run, write_sweep

from upcycle.analysis import compare
from upcycle.dashboard.charts import draw_heat_maps, draw_lines, styles
from upcycle.dashboard.config import ReportConfig
from upcycle.dashboard.page import write_report
from upcycle.dashboard.panels import SECTIONS
from upcycle.dashboard.records import read_place
from upcycle.errors import ConfigError, MissingPackageError, OutputError, RecordError
from upcycle.sweep.config import PackConfig
from upcycle.sweep.pack import pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")
PANELS = {panel.title: panel for section in SECTIONS for panel in section.panels}
# A language model has none of these.
OF_SCORES = ("Training squared error", "Held-out squared error")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that is not changed, and its page."""
    place = write_sweep(tmp_path_factory.mktemp("finished") / "runs")
    return place, report(place)


def report(place: Path, **changes: Any) -> str:
    """The page without scripts and styles."""
    given: dict[str, Any] = {
        "runs": str(place),
        "output": str(place.parent / "report.html"),
        "name": None,
        "arms": None,
        "baseline": None,
        "metric": None,
        "allow": [],
    }
    page = write_report(ReportConfig(**given | changes)).read_text()
    return re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)


def words(page: str) -> str:
    """What a reader reads, with its entities."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_answer_is_that_of_compare(finished: tuple[Path, str]) -> None:
    place, page = finished
    rows = read_place(place, name=None, arms=None).rows
    found = compare(rows, arms="arm", baseline="baseline").set_index("arm").loc["init=copy"]
    page = words(page)
    interval = f"{found['percent_low']:+.2f} to {found['percent_high']:+.2f} %"
    said = f"init=copy ends lower than baseline {found['percent']:+.2f} % (95 % interval {interval}), Holm p "
    assert said in page
    assert "dense ends within ±1 % of baseline +0.00 %" in page
    assert f"{escape(HOSTILE)} ends higher than baseline" in page
    assert "12 of 12 runs finished · 4 arms · 3 seeds · compared by val/loss (nats/token)" in page
    for text in TEXTS.values():
        assert escape(text) in page


def test_a_row_for_every_arm_that_was_compared(finished: tuple[Path, str]) -> None:
    table = re.search(r'<table class="comparison">.*?</table>', finished[1], flags=re.DOTALL)
    assert table
    (row,) = [each for each in table[0].split("<tr>") if ">init=copy<" in each]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[:4] == ["init=copy", "lower", "2.8033", "3.0000"]
    assert cells[4] == f"{np.mean(ENDS['init=copy']) - 3:+.4f}"


def test_charts_for_all_that_was_logged(finished: tuple[Path, str]) -> None:
    page = finished[1]
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    maps = [f"Load of each expert: {escape(arm)}" for arm in ENDS if arm != "dense"]
    assert [title for title in titles if title not in PANELS] == maps
    assert {title for title in titles if title in PANELS} == set(PANELS) - {"Load of each expert", *OF_SCORES}
    assert page.count('class="plotly-graph-div"') == len(titles) + 1  # and the differences


def test_a_chart_without_data_is_left_out(tmp_path: Path) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", report(write_sweep(tmp_path / "runs", ends={"dense": (3.0, 2.0)})))
    assert "Held-out loss against FLOPs" in titles
    assert "MaxVio" not in titles


def test_hostile_text_is_text(place: Path) -> None:
    """Names of arms and error lines come from files that anyone may have written."""
    change(place / "copies-1-0", status="failed", error="</script><img src=x onerror=alert(1)>")
    page = report(place)
    write = (place.parent / "report.html").read_text()
    assert "<img" not in page
    assert "</script><img" not in write
    assert escape("</script><img src=x onerror=alert(1)>") in page


def test_the_same_records_make_the_same_page(finished: tuple[Path, str]) -> None:
    place, page = finished
    assert report(place) == page


def test_packed_runs_make_the_same_page(place: Path) -> None:
    """Finished ones in a pack, a failed one as a directory."""
    change(place / "copies-1-2", status="failed", error="inf")
    page, named = report(place), report(place, arms="model")
    assert "11 of 12 runs finished" in words(page)
    pack(PackConfig(runs=str(place), name=None))
    assert [path.name for path in place.iterdir() if path.is_dir()] == ["copies-1-2"]
    assert report(place) == page
    assert report(place, arms="model") == named


def test_a_sweep_half_done(place: Path) -> None:
    """A run that failed, one that was killed, one that never began, an arm without a finished run."""
    change(place / "copies-1-2", status="failed", error="inf")
    lines = [*(f"line {number}" for number in range(9)), "", "upcycle: the loss is not finite"]
    (place / "copies-1-2.log").write_text("\n".join(lines))
    change(place / "copies-0-1", status="running")
    shutil.rmtree(place / "copies-3-0")
    for seed in range(3):
        change(place / f"copies-2-{seed}", status="interrupted")
    page = report(place)
    table = re.search(r'<table class="runs">.*?</table>', page, flags=re.DOTALL)
    assert table
    statuses = re.findall(r"<td>((?:not )?[a-z]+)</td>", table[0])
    assert [status for status in statuses if status != "finished"] == [
        "running",
        "failed",
        *3 * ["interrupted"],
        "not started",
    ]
    assert re.findall(r'<pre class="error">(.*?)</pre>', page, flags=re.DOTALL) == [
        "line 5\nline 6\nline 7\nline 8\nupcycle: the loss is not finite"
    ]
    said = words(page)
    assert "6 of 12 runs finished" in said
    assert f"no finished run of {escape(HOSTILE)} has measured val/loss" in said
    assert "init=copy cannot be told apart from baseline" in said
    assert "1 pair: underpowered" in said


def test_arms_that_may_not_be_compared_say_why(place: Path) -> None:
    for seed in range(3):
        change(place / f"copies-3-{seed}", data_hash="e" * 64)
    said = words(report(place))
    assert "dense was not compared with baseline dense and baseline cannot be compared: their data differ" in said
    assert "init=copy ends lower than baseline" in said
    assert "dense ends within" in words(report(place, allow=["data"]))


def test_a_baseline_without_runs(place: Path) -> None:
    for seed in range(3):
        change(place / f"copies-0-{seed}", status="failed")
    assert words(report(place)).count("no finished run of baseline has measured val/loss") == 3
    assert "ends lower than dense" in words(report(place, baseline="dense"))


def test_another_metric(place: Path) -> None:
    assert "compared by train/step_seconds (s)" in words(report(place, metric="train/step_seconds"))
    said = words(report(place, metric="moe/max_vio"))
    assert "no finished run of dense has measured moe/max_vio" in said


def test_arms_by_an_option_without_a_sweep(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"dense-{seed}", 3.0, seed=seed, dense=True)
        write_run(tmp_path / "runs" / f"moe-{seed}", 2.9 - seed / 100, seed=seed)
    said = words(report(tmp_path / "runs", arms="model", baseline="dense"))
    assert "upcycle ends" in said
    assert "than dense" in said or "from dense" in said
    assert "runs 4 of 4 runs finished · 2 arms · 2 seeds" in said
    said = words(report(tmp_path / "runs", arms=["model", "seed"], baseline=["dense", 0]))
    assert "upcycle, 1 was not compared with dense, 0" in said


def test_lines_are_means_over_seeds_with_t_intervals(finished: tuple[Path, str]) -> None:
    """By hand; the mutant: an interval from the standard error alone."""
    rows = read_place(finished[0], name=None, arms=None).rows
    figure = draw_lines(rows, PANELS["Held-out loss against FLOPs"], styles(list(ENDS), "baseline"))
    assert figure
    (mean,) = [trace for trace in figure.data if trace.name == "init=copy" and trace.customdata is not None]
    ends = np.array(ENDS["init=copy"])
    half = 4.302652729911275 * ends.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5 %
    assert mean.x[-1] == 40e9
    assert mean.y[-1] == pytest.approx(ends.mean())
    assert mean.customdata[-1] == pytest.approx([ends.mean() - half, ends.mean() + half, 3])
    assert abs(half - ends.std(ddof=1) / np.sqrt(3)) > 0.01


def test_a_heat_map_has_a_row_per_expert_of_every_layer(finished: tuple[Path, str]) -> None:
    rows = read_place(finished[0], name=None, arms=None).rows
    maps = draw_heat_maps(rows, PANELS["Load of each expert"], ENDS)
    assert list(maps) == [arm for arm in ENDS if arm != "dense"]
    drawn = maps["baseline"].data[0]
    assert np.shape(drawn.z) == (LAYERS * EXPERTS, 40)
    load = json.loads((finished[0] / "copies-0-0/metrics.jsonl").read_text().splitlines()[1])["moe/layer_1/load"]
    assert np.asarray(drawn.z)[EXPERTS:, 0] == pytest.approx(np.array(load) * EXPERTS, abs=1e-3)
    assert drawn.text[EXPERTS + 3][0] == "layer 1, expert 3"


def test_no_two_arms_look_the_same() -> None:
    looks = styles([str(arm) for arm in range(30)], "0")
    assert len({(look.colour, look.dash) for look in looks.values()}) == 30


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "val/los"}, "did you mean val/loss"),
        ({"name": "copie"}, "did you mean copies"),
        ({"baseline": "init=cop"}, "did you mean init=copy"),
        ({"arms": "moe.topk", "baseline": 2}, "did you mean moe.top_k"),
        ({"allow": ["dat"]}, "did you mean data"),
    ],
)
def test_what_is_not_there(place: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=says):
        report(place, **changes)


def test_damaged_files_beside_the_sweep(place: Path) -> None:
    (place / "others.json").write_text("{")
    assert "12 of 12 runs finished" in words(report(place))
    assert "12 of 12 runs finished" in words(report(place, name="copies"))
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        report(place, name="others")


def test_places_without_an_answer(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such directory"):
        report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="no runs found"):
        report(tmp_path / "empty")
    write_run(tmp_path / "alone/run", 3.0, seed=0)
    with pytest.raises(ConfigError, match="nothing names the arms"):
        report(tmp_path / "alone")
    with pytest.raises(RecordError, match="unknown sweep"):
        report(tmp_path / "alone", name="copies", arms="model")
    write_sweep(place, "others", {"baseline": (3.0,), "dense": (2.0,)})
    with pytest.raises(RecordError, match="several sweeps are there") as error:
        report(place)
    assert "copies, others" in str(error.value)
    assert "2 of 2 runs finished" in words(report(place, name="others"))
    for run in place.glob("others-*"):
        shutil.rmtree(run)
    with pytest.raises(RecordError, match="has logged anything yet"):
        report(place, name="others")


def test_an_output_that_cannot_be(place: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        report(place, output=str(place))


def test_the_command(place: Path, tmp_path: Path, upcycle: Callable[..., Outcome]) -> None:
    written = upcycle("report", f"runs={place}", f"output={tmp_path / 'new' / 'report.html'}", "baseline=dense")
    assert (written.status, written.out) == (0, f"wrote {tmp_path / 'new' / 'report.html'}\n")
    assert not list((tmp_path / "new").glob("*.tmp"))
    written = upcycle("report", place, "baseline=dense")
    assert (written.status, written.out) == (0, f"wrote {place / 'report.html'}\n")
    assert (place / "report.html").read_bytes() == (tmp_path / "new" / "report.html").read_bytes()
    upcycle("report").refused("a required option is missing", remedy="runs=")
    upcycle("report", f"runs={tmp_path / 'x'}", f"output={tmp_path / 'y'}").refused("there is no such directory")


def test_without_plotly(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'upcycle\[dashboard\]'"):
        report(place)


@pytest.mark.slow
def test_of_a_sweep_that_ran(tmp_path: Path, text: Path, upcycle: Callable[..., Outcome]) -> None:
    runs = tmp_path / "runs"
    trained = upcycle("train", "-m", *questions.shipped("layers", text), f"output={runs}")
    assert trained.status == 0, trained.err
    written = upcycle("report", runs)
    assert written.status == 0, written.err
    page = (runs / "report.html").read_text()
    assert "3 of 3 runs finished" in words(page)
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert {"Load of each expert: baseline", "MaxVio", "Held-out loss against FLOPs", "Step time"} <= set(titles)
    assert "1 pair: underpowered" in page
