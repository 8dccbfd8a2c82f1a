"""A sweep's records as the question they were made for: runs by arm, what is missing, and what was published about it.

Whatever has not finished is listed, not an error, so that a question can be looked at while its runs are made.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from omegaconf import OmegaConf

from upcycle.analysis.compare import COLUMNS, compare
from upcycle.analysis.frontier import SAVING_COLUMNS, iso_loss_saving
from upcycle.analysis.outcomes import SEED
from upcycle.analysis.runs import FACTS, load_runs
from upcycle.errors import RecordError, near_misses
from upcycle.options.arguments import CONF
from upcycle.sweep.index import check_output, read_index
from upcycle.tracking.packs import find_run
from upcycle.tracking.schema import METRICS
from upcycle.tracking.status import FINISHED, NOT_STARTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Expected = Literal["lower", "higher", "same", "not lower"]
_SHIPPED = CONF / "sweeps"
_TEXTS = ("question", "hypothesis", "metric", "published")
_DERIVED = ("source_hash", "tokens_per_step")
_NO_RUNS = pd.DataFrame(columns=["run", "step", SEED, *FACTS, *_DERIVED, *(each.name for each in METRICS), "arm"])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep has found so far.

    Attributes:
        name: of its file.
        question, hypothesis, metric, published: what the file says.
        arms: names in the order of the file; none before it was started.
        runs: as `load_runs` gives them, with a column `arm`; finished runs only.
        records: run.json of the same runs, by `run`.
        missing: `arm`, `seed` and `status` of the others: what run.json says, or NOT_STARTED.
    """

    name: str
    question: str
    hypothesis: str
    metric: str
    published: str
    arms: tuple[str, ...]
    runs: pd.DataFrame
    records: Mapping[str, Mapping[str, Any]]
    missing: pd.DataFrame

    def only(self, *arms: str) -> Sweep:
        """The sweep without the other arms."""
        runs = self.runs[self.runs["arm"].isin(arms)]
        return replace(
            self,
            arms=tuple(arm for arm in self.arms if arm in arms),
            runs=runs,
            records={run: self.records[run] for run in runs["run"].unique()},
            missing=self.missing[self.missing["arm"].isin(arms)],
        )

    def beside(self, other: Sweep) -> Sweep:
        """The sweep with another one's arms, which have other names, besides its own."""
        return replace(
            self,
            arms=self.arms + other.arms,
            runs=_below(self.runs, other.runs),
            records={**self.records, **other.records},
            missing=_below(self.missing, other.missing),
        )

    def renamed(self, names: Mapping[str, str]) -> Sweep:
        """The sweep with other names for some arms."""
        return replace(
            self,
            arms=tuple(names.get(arm, arm) for arm in self.arms),
            runs=self.runs.assign(arm=self.runs["arm"].replace(names)),
            missing=self.missing.assign(arm=self.missing["arm"].replace(names)),
        )

    def called(self, *names: str) -> Sweep:
        """The sweep with names for all its arms, in the order of the file."""
        return self.renamed(dict(zip(self.arms, names, strict=bool(self.arms))))

    def compare(
        self, baseline: str, *, metric: str | None = None, until: float = 1.0, allow: Sequence[str] = ()
    ) -> pd.DataFrame:
        """`upcycle.analysis.compare` of the arms that have finished runs of the same seeds, in the order of the file.

        Args:
            baseline: the arm to compare with.
            metric: the sweep's own by default.
            until: share of each run to look at: the metric's last value in it, 0 for the one before the first step.
            allow: what arms may not share.

        Returns:
            One row per arm; none where no run of the baseline has finished.
        """
        runs = self._paired(baseline)
        if runs.empty:
            return pd.DataFrame(columns=COLUMNS)
        runs = runs[runs["step"] <= until * runs["steps"]]
        metric = metric or self.metric
        return self._in_order(compare(runs, arms="arm", baseline=baseline, metric=metric, allow=allow))

    def saving(self, baseline: str, *, sunk_flops: float, allow: Sequence[str] = ()) -> pd.DataFrame:
        """`upcycle.analysis.iso_loss_saving` of the same arms."""
        runs = self._paired(baseline)
        if runs.empty:
            return pd.DataFrame(columns=SAVING_COLUMNS)
        saved = iso_loss_saving(
            runs, arms="arm", baseline=baseline, sunk_flops=sunk_flops, metric=self.metric, allow=allow
        )
        return self._in_order(saved)

    def _paired(self, baseline: str) -> pd.DataFrame:
        """The runs of the baseline and of arms that share a seed with it; none where nothing does."""
        seeds = self.runs.loc[self.runs["arm"] == baseline, SEED]
        arms = set(self.runs.loc[self.runs[SEED].isin(seeds), "arm"])
        return self.runs[self.runs["arm"].isin(arms if len(arms) > 1 else ())]

    def _in_order(self, table: pd.DataFrame) -> pd.DataFrame:
        return table.sort_values("arm", key=lambda arms: arms.map(self.arms.index), ignore_index=True)


def load_sweep(directory: str | Path, name: str) -> Sweep:
    """Read what `upcycle train -m +sweeps=NAME output=DIRECTORY` has written.

    Args:
        directory: the sweep's output, which may be other sweeps' too.
        name: of the sweep.

    Raises:
        RecordError: there is no such directory; the sweep was not started there and is not one that is shipped; or
            the records or the index cannot be read.
        SourceError: a run.json is damaged.
    """
    place = Path(directory).expanduser()
    content = _content(place, name)
    index: dict[str, dict[str, Any]] = content.get("runs", {})
    found = {run: find_run(place / run) for run in index}
    records = {run: content for run, content in found.items() if content is not None}
    finished = {run: record for run, record in records.items() if record.get("status") == FINISHED}
    missing = [
        {"arm": each["arm"], SEED: each[SEED], "status": records.get(run, {}).get("status", NOT_STARTED)}
        for run, each in index.items()
        if run not in finished
    ]
    return Sweep(
        name=name,
        **{text: content[text] for text in _TEXTS},
        arms=tuple(dict.fromkeys(each["arm"] for each in index.values())),
        runs=_runs(place, {run: index[run]["arm"] for run in finished}),
        records={str(place / run): record for run, record in finished.items()},
        missing=pd.DataFrame(missing, columns=["arm", SEED, "status"]),
    )


def _content(place: Path, name: str) -> dict[str, Any]:
    """The sweep's index, or its file where it was not started yet."""
    check_output(place)
    index, file = read_index(place, name), _SHIPPED / f"{name}.yaml"
    if index:
        return index
    if not file.exists():
        known = {each.stem for each in (*place.glob("*.json"), *_SHIPPED.glob("*.yaml"))}
        raise RecordError("unknown sweep", found=name, remedy=near_misses(name, known))
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return dict(content["sweep"])


def _below(*frames: pd.DataFrame) -> pd.DataFrame:
    """Frames one below the other; empty ones have no types to keep."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def _runs(place: Path, arms: Mapping[str, str]) -> pd.DataFrame:
    if not arms:
        return _NO_RUNS
    runs = load_runs(*(place / run for run in arms))
    return runs.assign(arm=runs["run"].astype(object).map(lambda run: arms[Path(run).name]))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An outcome that somebody expects, as a comparison of two arms.

    Attributes:
        source: who says so.
        says: what they say, in words.
        arm, baseline: the arms that it is about.
        expected: verdict of `compare` that would be the same outcome; "not lower" is "same" or "higher".
        metric: of the schema; None takes the sweep's own.
        until, allow: share of the run to look at and what the arms may not share, as for `Sweep.compare`.
    """

    source: str
    says: str
    arm: str
    baseline: str
    expected: Expected
    metric: str | None = None
    until: float = 1.0
    allow: tuple[str, ...] = ()


def judge(sweep: Sweep, claims: Sequence[Claim]) -> pd.DataFrame:
    """Hold claims against what a sweep found.

    Returns:
        One row per claim: `source`, `says`, `arm`, `against` (the baseline), `metric`, `until`; the columns of
        `compare` that it rests on; and `outcome`: `agrees`, `disagrees`, `undecided` where the comparison is
        underpowered, or `not measured` where runs are missing.

    Raises:
        RecordError: a claim is about an arm that the sweep does not have.
    """
    rows = []
    for claim in claims:
        for arm in (claim.arm, claim.baseline):
            if sweep.arms and arm not in sweep.arms:
                raise RecordError("the sweep has no such arm", found=arm, remedy=near_misses(arm, sweep.arms))
        compared = sweep.compare(claim.baseline, metric=claim.metric, until=claim.until, allow=claim.allow)
        found = compared[compared["arm"] == claim.arm].to_dict("records")
        outcome = _outcome(claim.expected, found[0]["verdict"]) if found else "not measured"
        about = {"source": claim.source, "says": claim.says, "arm": claim.arm, "against": claim.baseline}
        asked = {"metric": claim.metric or sweep.metric, "until": claim.until}
        rows.append({**about, **asked, "outcome": outcome, **(found[0] if found else {})})
    return pd.DataFrame(rows)


def _outcome(expected: Expected, verdict: str) -> str:
    if verdict == "underpowered":
        return "undecided"
    seen = verdict != "lower" if expected == "not lower" else verdict == expected
    return "agrees" if seen else "disagrees"
