"""`upcycle COMMAND key=value …`: every command is a Hydra application; errors of the user are printed, not traced."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from upcycle.cli.completion import complete
from upcycle.convert.interruption import Interruption
from upcycle.dashboard import config as reporting
from upcycle.errors import ConfigError, UpcycleError, did_you_mean
from upcycle.evaluation import config as evaluation
from upcycle.options import config as options
from upcycle.options.arguments import (
    ARM,
    CONF,
    MULTIRUN,
    SWEEPS,
    file_choices,
    is_sweep,
    literal_paths,
    names_sweep,
    quoted,
    readable,
    sweep_choice,
    typed_options,
    without_multirun,
)
from upcycle.parallel import config as planning
from upcycle.sweep import config as sweeping
from upcycle.tracking import config as tracking
from upcycle.train import config as training

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig

FULL_ERROR = "HYDRA_FULL_ERROR"
COLLECTIONS = (100_000, 50, 100)  # Python's own cost a tenth of what a command takes to start: imports make no garbage
EXPECTED_ERRORS = (UpcycleError, HydraException, OmegaConfBaseException, OSError)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command.

    Attributes:
        summary: one line for `upcycle --help`.
        options: dataclass of its options; None where the function takes the config as it is composed.
        function: "module:function" that takes the options and returns the exit status.
        paths: options that are paths, whose values are taken literally.
        positional: option that a bare first argument stands for; SWEEPS takes a file of `sweeps/` alone.
        files: groups of options that a YAML file can stand for.
    """

    summary: str
    options: type | None
    function: str
    paths: tuple[str, ...]
    positional: str | None = None
    files: tuple[str, ...] = ()


COMMANDS = {
    "plan": Command(
        summary="what convert would do and cost, and what training would take on many GPUs",
        options=planning.PlanConfig,
        function="upcycle.cli.commands:plan",
        paths=("source", "output"),
        files=("gpu",),
    ),
    "convert": Command(
        summary="dense checkpoint in, fine-grained MoE checkpoint out",
        options=options.ConvertConfig,
        function="upcycle.cli.commands:convert",
        paths=("source", "output"),
    ),
    "verify": Command(
        summary="dense against MoE: the equivalence report",
        options=options.VerifyConfig,
        function="upcycle.cli.commands:verify",
        paths=("source", "moe", "text"),
    ),
    "train": Command(
        summary="dense, upcycled, from scratch or a checkpoint: one module trains them all",
        options=training.TrainConfig,
        function="upcycle.cli.commands:train",
        paths=("source", "output", "tokenizer"),
    ),
    "plan-sweep": Command(
        summary="what a sweep would run and cost, and everything wrong with it",
        options=None,
        function="upcycle.sweep.command:show",
        paths=("source", "output", "tokenizer", "agent"),
        positional=SWEEPS,
    ),
    "dashboard": Command(
        summary="the W&B workspace of a sweep",
        options=None,
        function="upcycle.dashboard.command:dashboard",
        paths=("source", "output", "tokenizer"),
        positional=SWEEPS,
    ),
    "report": Command(
        summary="a sweep on one HTML page that needs nothing but a browser",
        options=reporting.ReportConfig,
        function="upcycle.cli.commands:report",
        paths=("runs", "output"),
        positional="runs",
    ),
    "pack": Command(
        summary="the finished runs of sweeps as one file a sweep, instead of a directory a run",
        options=sweeping.PackConfig,
        function="upcycle.cli.commands:pack",
        paths=("runs",),
        positional="runs",
    ),
    "sync": Command(
        summary="send to W&B what is in the records of runs and not there yet",
        options=tracking.SyncConfig,
        function="upcycle.cli.commands:sync",
        paths=("path",),
        positional="path",
    ),
    "export": Command(
        summary="a trained run as a Hugging Face checkpoint, or with a recipe for Megatron-Bridge",
        options=training.ExportConfig,
        function="upcycle.cli.commands:export",
        paths=("run", "moe", "output"),
        files=("gpu",),
    ),
    "evaluate": Command(
        summary="loss on held-out text by domain, and tasks of the lm-evaluation-harness",
        options=evaluation.EvaluateConfig,
        function="upcycle.cli.commands:evaluate",
        paths=("model", "output"),
    ),
    "inspect": Command(
        summary="what a checkpoint is",
        options=options.InspectConfig,
        function="upcycle.cli.commands:inspect",
        paths=("path",),
        positional="path",
    ),
}

SWEEP = Command(
    summary="train over the arms and seeds of a sweep",
    options=None,
    function="upcycle.sweep.command:train",
    paths=(*COMMANDS["train"].paths, f"+{ARM}", f"++{ARM}"),  # names of arms need no quotes either
)


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"upcycle: {self.format(record)}", file=sys.stderr)


def main() -> None:
    """Entry point of the `upcycle` command."""
    gc.set_threshold(*COLLECTIONS)
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        print(f"upcycle {version('upcycle')}")
        return
    logger = logging.getLogger("upcycle")
    logger.handlers = [_StandardError()]
    show_trace = os.environ.get(FULL_ERROR) == "1"
    logger.setLevel(logging.DEBUG if show_trace else logging.INFO)
    try:
        with _full_errors():
            if "-sc" in arguments or "--shell-completion" in arguments:
                complete(COMMANDS)
                return
            name = _command_name(arguments[0])
            if "--resolve" in arguments and not any(flag.startswith(("--cfg", "-c")) for flag in arguments):
                raise ConfigError("--resolve needs --cfg", found="--resolve", expected="--cfg job --resolve")
            status = _run(name, arguments[1:], show_trace=show_trace)
            sys.stdout.flush()
            sys.exit(status)
    except BrokenPipeError:
        _stop_printing()
        sys.exit(1)
    except EXPECTED_ERRORS as error:
        if show_trace:
            raise
        print(f"upcycle: {readable(error, arguments[0])}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("upcycle: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _full_errors() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


def _stop_printing() -> None:
    """The reader, such as `head`, has had enough: nothing may be flushed to it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, arguments: Sequence[str], *, show_trace: bool) -> int:
    command, statuses = COMMANDS[name], list[int]()
    if name == "train" and names_sweep(arguments):
        command, arguments = SWEEP, without_multirun(arguments)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def application(composed: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"upcycle: {name} {' '.join(HydraConfig.get().overrides.task)}", file=sys.stderr)
        try:
            statuses.append(_execute(command, composed))
        except BrokenPipeError:
            _stop_printing()
            statuses.append(1)
        except EXPECTED_ERRORS as error:
            if show_trace:
                raise
            print(f"upcycle: {readable(error, name)}", file=sys.stderr)
            statuses.append(1)

    given = file_choices(command.files, literal_paths(command.paths, _expand_positional(command, arguments)))
    with tempfile.TemporaryDirectory(prefix="upcycle-") as scratch:
        sys.argv = [sys.argv[0], *(_sweep_into(scratch, given) if is_sweep(given) else given)]
        application()
    return max(statuses, default=0)


def _sweep_into(scratch: str, arguments: Sequence[str]) -> list[str]:
    """Hydra writes a multirun.yaml into the sweep's directory, whatever else is set; and it wants its flags first."""
    flags = [argument for argument in arguments if argument in MULTIRUN]
    return [*flags, f"hydra.sweep.dir={quoted(scratch)}", *(each for each in arguments if each not in MULTIRUN)]


def _execute(command: Command, composed: DictConfig) -> int:
    if command.options and "question" in composed.get("sweep", {}):
        raise ConfigError(
            "+sweeps=NAME is for a multirun, or for one of its arms",
            found="neither -m nor +arm=NAME",
            expected="-m +sweeps=NAME",
            remedy="add -m",
        )
    given = typed_options(command.options, composed) if command.options else composed
    module, function = command.function.split(":")
    with Interruption():
        return int(getattr(importlib.import_module(module), function)(given))


def _command_name(given: str) -> str:
    if given not in COMMANDS:
        raise ConfigError(
            "unknown command", found=given, expected=", ".join(COMMANDS), remedy=did_you_mean(given, COMMANDS)
        )
    return given


def _expand_positional(command: Command, arguments: Sequence[str]) -> list[str]:
    """Put the option's name before a bare first argument; a path may well contain "="."""
    if not command.positional or not arguments or arguments[0].startswith(("-", "+", "~", "hydra")):
        return list(arguments)
    if command.positional == SWEEPS:
        return [sweep_choice(arguments[0]), *arguments[1:]]
    key, equals, _ = arguments[0].partition("=")
    if equals and command.options and key in {field.name for field in fields(command.options)}:
        return list(arguments)
    return [f"{command.positional}={quoted(arguments[0])}", *arguments[1:]]


def _usage() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: upcycle COMMAND key=value ...",
            "",
            *lines,
            "",
            "upcycle COMMAND --help shows a command's options; -m runs it over comma-separated values.",
            'Tab completion: eval "$(upcycle -sc install=bash)"',
        ]
    )
