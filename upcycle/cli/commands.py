"""What each command prints; the work is done elsewhere."""

from __future__ import annotations

import atexit
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from upcycle.convert.interruption import Interruption
from upcycle.errors import ConfigError, did_you_mean
from upcycle.files.json import json_text
from upcycle.options.arguments import options_of
from upcycle.options.config import InspectConfig, VerifyConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Callback
    from rich.console import RenderableType

    from upcycle.convert.prepare import Conversion
    from upcycle.dashboard.config import ReportConfig
    from upcycle.evaluation.config import EvaluateConfig
    from upcycle.models.moe import MoeDescription
    from upcycle.options.config import ConvertConfig
    from upcycle.parallel.config import PlanConfig
    from upcycle.parallel.sizes import ModelSizes
    from upcycle.sweep.config import PackConfig
    from upcycle.tracking.config import SyncConfig
    from upcycle.train.config import ExportConfig, TrainConfig
    from upcycle.train.prepared import Run

    # What a plan says, as data and for people; the sizes of its model; and its configuration and shape.
    Described = tuple[
        dict[str, Any], RenderableType, Callable[[], ModelSizes], Callable[[], tuple[Any, MoeDescription]]
    ]

FORMATS = ("table", "json")


def plan(config: PlanConfig) -> int:
    """`upcycle plan`: print what `convert` would do, and how it would train; 1 if that does not fit in memory.

    Of a source that is a mixture of experts already: what it is, and how it would train.
    """
    from upcycle.models.moe import is_mixture
    from upcycle.parallel.planning import plan_training, planned_json
    from upcycle.parallel.render import planned_table
    from upcycle.precision.config import BFLOAT16, FLOAT32

    _check_format(config.format)
    data, table, sizes, model = _mixture(config.source) if is_mixture(config.source) else _conversion(config)
    tables = [table]
    if config.precision not in (FLOAT32, BFLOAT16):
        more, shown = _precision(config, *model())
        data, tables = {**data, "precision": more}, [table, shown]
    if config.parallel is None:
        _print(config.format, data, Group(*tables))
        return 0
    planned = plan_training(config, sizes())
    _print(config.format, {**data, "training": planned_json(planned)}, Group(*tables, planned_table(planned)))
    return 0 if planned.fits else 1


def _precision(config: PlanConfig, model: Any, moe: MoeDescription) -> tuple[dict[str, Any], RenderableType]:
    from upcycle.precision.planning import plan_precision
    from upcycle.precision.render import precision_json, precision_table

    tokens = config.workload.micro * config.workload.sequence_length
    planned = plan_precision(model, moe, config.precision, config.quantise, tokens=tokens)
    return precision_json(planned), precision_table(planned)


def _conversion(config: PlanConfig) -> Described:
    from upcycle.convert.prepare import prepare
    from upcycle.convert.render import plan_json, plan_table
    from upcycle.models.moe import planned_model
    from upcycle.parallel.sizes import conversion_sizes

    conversion = prepare(config, execute=False)
    sizes, model = partial(conversion_sizes, conversion), partial(planned_model, conversion.plan)
    return plan_json(conversion), plan_table(conversion), sizes, model


def _mixture(source: str) -> Described:
    from upcycle.models.config import load_config
    from upcycle.models.moe import describe_moe
    from upcycle.parallel.sizes import checkpoint_sizes
    from upcycle.verify.inspection import inspect, inspection_table

    directory, found = Path(source).expanduser(), inspect(InspectConfig(path=source, format="json"))
    model = load_config(directory), describe_moe(directory)
    return found, inspection_table(found), partial(checkpoint_sizes, *model), lambda: model


def convert(config: ConvertConfig) -> int:
    """`upcycle convert`: write the checkpoint, with a progress bar on standard error; with `verify`, its status."""
    from upcycle.convert.render import plan_table
    from upcycle.convert.run import convert as run

    progress = Progress(
        TextColumn("writing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def on_plan(conversion: Conversion, nbytes: int):  # type: ignore[no-untyped-def]
        Console().print(plan_table(conversion))
        bar = progress.add_task("writing", total=nbytes)
        progress.start()

        def on_bytes(count: int) -> None:
            interruption.check()
            progress.advance(bar, count)

        return on_bytes

    try:
        with Interruption() as interruption:
            output = run(config, on_plan=on_plan)
    finally:
        if progress.live.is_started:
            progress.stop()
    if output is None:
        return 0
    print(f"wrote {output}")
    if config.verify:
        return verify(options_of(VerifyConfig, "verify", source=config.source, moe=output))
    print(f"next: {shlex.join(['upcycle', 'verify', f'source={config.source}', f'moe={output}'])}")
    return 0


def verify(config: VerifyConfig) -> int:
    """`upcycle verify`: print the equivalence report; 1 if the losses differ by more than the tolerance."""
    from upcycle.verify.report import report_table, write_report
    from upcycle.verify.run import verify as run

    _check_format(config.format)
    report = run(config)
    write_report(report, config.moe)
    _print(config.format, report, report_table(report))
    return 0 if report["passed"] else 1


def inspect(config: InspectConfig) -> int:
    """`upcycle inspect`: print what a checkpoint is."""
    from upcycle.verify.inspection import inspect as run
    from upcycle.verify.inspection import inspection_table

    _check_format(config.format)
    found = run(config)
    _print(config.format, found, inspection_table(found))
    return 0


def train(config: TrainConfig) -> int:
    """`upcycle train`: a panel that says what will run, a progress bar, and where the run is."""
    from upcycle.distributed.ranks import leave_ranks
    from upcycle.train.display import TrainingProgress, panel, summary
    from upcycle.train.run import train as run

    def on_start(prepared: Run) -> list[Callback]:
        Console(stderr=True).print(panel(prepared))
        return [TrainingProgress(prepared)] if config.progress else []

    finished = run(config, on_start=on_start)
    atexit.register(leave_ranks)  # a multirun trains on in the same group
    if finished.ranks.main:
        Console().print(summary(finished))
    return 0


def pack(config: PackConfig) -> int:
    """`upcycle pack`: print what the packs hold, and which directories are still there."""
    from upcycle.sweep.pack import pack as run

    packing = run(config)
    for file, (count, new) in packing.packs.items():
        print(f"packed  {file}: {count} runs, {new} of them new")
    for directory, reason in packing.kept.items():
        print(f"kept    {directory}: {reason}")
    return 0


def sync(config: SyncConfig) -> int:
    """`upcycle sync`: print which runs are at W&B; 1 if something could not be sent."""
    from upcycle.tracking.wandb_sync import sync as run

    runs = run(config)
    for each in runs:
        if each.error:
            print(f"unsent  {each.directory}: {each.unsent} of {each.rows} rows: {each.error}")
        else:
            print(f"sent    {each.directory}: {each.rows} rows, {each.url}")
    return 1 if any(each.error for each in runs) else 0


def report(config: ReportConfig) -> int:
    """`upcycle report`: write the page."""
    from upcycle.dashboard.page import write_report

    print(f"wrote {write_report(config)}")
    return 0


def export(config: ExportConfig) -> int:
    """`upcycle export`: write the trained model as a checkpoint, or with a recipe for Megatron-Bridge."""
    from upcycle.megatron.export import export_recipe
    from upcycle.train.export import export as run

    print(f"wrote {export_recipe(config) if config.format == 'megatron-bridge' else run(config)}")
    return 0


def evaluate(config: EvaluateConfig) -> int:
    """`upcycle evaluate`: print what was measured, and write it to a file if one is given."""
    from upcycle.evaluation.run import evaluate as run
    from upcycle.evaluation.run import evaluation_table, write_evaluation

    _check_format(config.format)
    found = run(config)
    if config.output:
        write_evaluation(found, config.output)
    _print(config.format, found, evaluation_table(found))
    return 0


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise ConfigError("unknown format", found=name, expected=", ".join(FORMATS), remedy=did_you_mean(name, FORMATS))


def _print(form: str, data: object, table: object) -> None:
    if form == "json":
        print(json_text(data, indent=2))
    else:
        Console().print(table)
