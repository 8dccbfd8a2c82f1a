"""Words that follow the data, as Markdown that a notebook shows: question and method of a sweep, and its answer."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from upcycle.analysis.outcomes import SEED, label
from upcycle.tracking.record import flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    from upcycle.analysis.questions import Sweep

NOT_RUN = "**Not run at this scale.**"
_VERDICTS = {"lower": "lower", "higher": "higher", "same": "within ±1 %", "underpowered": "too few pairs to tell"}
_OUTCOMES = ("agrees", "disagrees", "undecided", "not measured")


class Markdown(str):
    """Text that notebooks render."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def introduction(sweep: Sweep) -> Markdown:
    """The sweep's question, what is expected and published, how it was measured, and which runs are missing."""
    texts = {"Question": sweep.question, "Hypothesis": sweep.hypothesis, "Published": sweep.published}
    parts = [f"**{title}.** {' '.join(text.split())}" for title, text in texts.items()]
    return Markdown("\n\n".join([*parts, _method(sweep), *_missing(sweep)]))


def answer(compared: pd.DataFrame, *, metric: str = "val/loss") -> Markdown:
    """What a comparison says, arm by arm.

    Args:
        compared: from `Sweep.compare`.
        metric: the one that was compared.
    """
    if compared.empty:
        return Markdown("Nothing can be said yet: no arm shares a finished seed with the baseline.")
    head = ["arm", metric, "difference from the baseline", "95 % interval", "pairs", "Holm p", "verdict"]
    rows = [
        (
            each.arm,
            f"{each.value:.4f}",
            f"{each.percent:+.2f} %",
            interval(each.percent_low, each.percent_high),
            each.pairs,
            "–" if math.isnan(each.p_holm) else f"{each.p_holm:.2g}",
            f"**{each.verdict}**",
        )
        for each in compared.itertuples()
    ]
    note = (
        "`lower` and `higher`: p below 0.05 after Holm's adjustment; `same`: the interval lies within ±1 %; "
        "`underpowered`: neither can be said of so few pairs."
    )
    differing = [f"`{each.arm}` ({each.differs})" for each in compared.itertuples() if each.differs]
    if differing:
        note += f" Arms that do not share everything with the baseline, as is meant: {'; '.join(differing)}."
    arms = {verdict: compared.loc[compared["verdict"] == verdict, "arm"] for verdict in _VERDICTS}
    summary = [
        f"{_VERDICTS[verdict]}: {', '.join(f'`{arm}`' for arm in each)}" for verdict, each in arms.items() if len(each)
    ]
    return Markdown(f"Against the baseline, {'; '.join(summary)}.\n\n{table(head, rows)}\n\n{note}")


def judgement(judged: pd.DataFrame) -> Markdown:
    """Which outcomes that somebody expects are seen here, claim by claim.

    Args:
        judged: from `judge`.
    """
    head = ["who", "says", "here", "compared", "found"]
    rows = [
        (each["source"], each["says"], f"**{each['outcome']}**", f"{each['arm']} with {each['against']}", _found(each))
        for each in judged.to_dict("records")
    ]
    counts = Counter(judged["outcome"])
    summary = ", ".join(f"{outcome} {counts[outcome]}" for outcome in _OUTCOMES if counts[outcome])
    return Markdown(f"Expected outcomes: {len(judged)}; {summary}.\n\n{table(head, rows)}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; a bar within a cell does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def interval(low: float, high: float) -> str:
    """Bounds in percent; a dash where one pair gives none."""
    return "–" if math.isnan(low) else f"{low:+.2f} to {high:+.2f} %"


def _method(sweep: Sweep) -> str:
    if not sweep.records:
        command = f"`upcycle train -m +sweeps={sweep.name} scale=laptop output=DIR`"
        return f"{NOT_RUN} No run has finished; {command} makes the records."
    return "**Method.** Arms are paired by seed, which decides routers and the order of the text.\n\n" + table(
        ["", ""], _settings(sweep).items()
    )


def _settings(sweep: Sweep) -> dict[str, str]:
    """How the runs were made, as they recorded it themselves."""
    ends = sweep.runs.groupby("run", sort=False, observed=True).tail(1)
    options = [flat(record["config"]) for record in sweep.records.values()]
    hardware = [_machine(record["hardware"]) for record in sweep.records.values() if "hardware" in record]
    versions = [" ".join(each) for record in sweep.records.values() for each in record.get("versions", {}).items()]
    runs = sweep.runs.groupby("run", sort=False, observed=True)
    commits = [_commit(record) for record in sweep.records.values()]
    hours = float((runs["train/step_seconds"].mean() * runs["step"].max()).sum()) / 3600
    return {
        "runs": f"{len(ends)} of {ends['arm'].nunique()} arms; seeds {_each(ends[SEED])}",
        "dense model": _each(each["source"] for each in options),
        "text": f"{_each(each['data.name'] for each in options)}, {_each(ends['tokens_per_step'])} tokens a step in "
        f"windows of {_each(each['sequence_length'] for each in options)}",
        "budget of a run": f"{_span(ends['train/flops'], '.3g')} training FLOPs, "
        f"{_span(ends['train/tokens'] / 1e6, '.3g')} M tokens, {_span(ends['step'], ',.0f')} steps",
        "peak learning rate": _each(each["schedule.peak"] for each in options),
        "hardware": f"{_each(hardware)}; {hours:.2g} h of training in all",
        "versions": f"{_each(versions)}; commit {_each(commits)}",
    }


def _commit(record: Mapping[str, Any]) -> str:
    changed = " with changes" if record.get("git_dirty") else ""
    return (record.get("git_commit") or "unknown")[:10] + changed


def _machine(hardware: Mapping[str, Any]) -> str:
    threads = f"{hardware['cpus']} CPUs, {hardware['threads']} threads a run"
    return ", ".join([hardware["machine"], threads, *hardware["gpus"]])


def _missing(sweep: Sweep) -> list[str]:
    if sweep.missing.empty:
        return []
    arms = [f"`{arm}` ({'; '.join(_statuses(group))})" for arm, group in sweep.missing.groupby("arm", sort=False)]
    return [f"**Missing.** Runs that have not finished and do not count: {len(sweep.missing)}. {', '.join(arms)}."]


def _statuses(group: pd.DataFrame) -> list[str]:
    return [f"seed {_each(seeds)} {status}" for status, seeds in group.groupby("status", sort=False)[SEED]]


def _found(judged: Mapping[str, Any]) -> str:
    if judged["outcome"] == "not measured":
        return "–"
    until = judged["until"]
    when = {0.0: " before the first step", 1.0: ""}.get(until, f" at {until:.0%} of the run")
    bounds = interval(judged["percent_low"], judged["percent_high"])
    measured = f"{judged['metric']}{when} {judged['verdict']}: {judged['percent']:+.2f} %"
    return f"{measured} ({bounds}, n = {judged['pairs']:.0f})"


def _each(values: Iterable[Any]) -> str:
    """Different values in their order."""
    return ", ".join(label(value) for value in dict.fromkeys(values)) or "not recorded"


def _span(values: pd.Series, form: str) -> str:
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"
