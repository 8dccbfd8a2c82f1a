"""`upcycle COMMAND key=value …`: every command is a Hydra application; errors of the user are printed, not traced."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from upcycle import config as options
from upcycle.errors import ConfigError, UpcycleError, near_misses

CONF = Path(__file__).parent / "conf"
FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command.

    Attributes:
        summary: one line for `upcycle --help`.
        options: dataclass of its options.
        function: "module:function" that takes the options and returns the exit status.
        positional: option that the first bare argument stands for.
    """

    summary: str
    options: type
    function: str
    positional: str | None = None


COMMANDS = {
    "plan": Command(
        summary="what convert would do, and what it would cost",
        options=options.PlanConfig,
        function="upcycle.commands:plan",
    ),
    "convert": Command(
        summary="dense checkpoint in, fine-grained MoE checkpoint out",
        options=options.ConvertConfig,
        function="upcycle.commands:convert",
    ),
    "verify": Command(
        summary="dense against MoE: the equivalence report",
        options=options.VerifyConfig,
        function="upcycle.commands:verify",
    ),
    "inspect": Command(
        summary="what a checkpoint is",
        options=options.InspectConfig,
        function="upcycle.commands:inspect",
        positional="path",
    ),
}


def main() -> None:
    """Entry point of the `upcycle` command."""
    arguments = sys.argv[1:]
    if "-sc" in arguments or "--shell-completion" in arguments:
        _complete()
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    show_trace = os.environ.get(FULL_ERROR) == "1"
    try:
        name = _command_name(arguments[0])
        sys.exit(_run(name, _expand_positional(COMMANDS[name], arguments[1:]), show_trace=show_trace))
    except (UpcycleError, HydraException, OmegaConfBaseException) as error:
        if show_trace:
            raise
        print(f"upcycle: {_readable(error, arguments[0])}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(name: str, arguments: Sequence[str], *, show_trace: bool) -> int:
    os.environ[FULL_ERROR] = "1"
    sys.argv = [sys.argv[0], *arguments]
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def application(composed: DictConfig) -> None:
        try:
            statuses.append(_execute(COMMANDS[name], composed))
        except UpcycleError as error:
            if show_trace:
                raise
            print(f"upcycle: {error}", file=sys.stderr)
            statuses.append(1)

    application()
    return max(statuses, default=0)


def _execute(command: Command, composed: DictConfig) -> int:
    typed = typed_options(command.options, composed)
    module, function = command.function.split(":")
    return int(getattr(importlib.import_module(module), function)(typed))


def typed_options(kind: type, composed: DictConfig) -> Any:
    """Merge a composed config into its frozen dataclass.

    Raises:
        ConfigError: a required option is missing, or a value has the wrong type.
    """
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra"))
    if missing:
        raise ConfigError(
            "a required option is missing", found="nothing", expected=f"{missing[0]}=…", remedy=f"add {missing[0]}=VALUE"
        )
    plain = {key: value for key, value in OmegaConf.to_container(composed, resolve=True).items() if key != "hydra"}
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name} is not valid", found=first["input"], expected=first["msg"]) from error


def _command_name(given: str) -> str:
    if given not in COMMANDS:
        raise ConfigError("unknown command", found=given, expected=", ".join(COMMANDS), remedy=near_misses(given, COMMANDS))
    return given


def _expand_positional(command: Command, arguments: Sequence[str]) -> list[str]:
    if command.positional and arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        quoted = arguments[0].replace("\\", "\\\\").replace("'", "\\'")
        return [f"{command.positional}='{quoted}'", *arguments[1:]]
    return list(arguments)


def _readable(error: Exception, command: str) -> str:
    if isinstance(error, UpcycleError):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    if key and "not in struct" in str(cause):
        known = _known_keys(command)
        return str(ConfigError("unknown option", found=key, expected=near_misses(key, known), remedy=f"upcycle {command} --help"))
    return "\n  ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _known_keys(command: str) -> list[str]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = hydra.compose(config_name=command)
    keys = []
    for key, value in composed.items_ex(resolve=False):
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, DictConfig) else [str(key)]
    return keys


def _usage() -> str:
    lines = [f"  {name:<9}{command.summary}" for name, command in COMMANDS.items()]
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


def _complete() -> None:
    """Answer the shell: command names for the first word, Hydra's completion of that command after it."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query" in sys.argv[-1] and (len(words) < 2 or (len(words) == 2 and not line.endswith(" "))):
        print(" ".join(COMMANDS))
        return
    name = words[1] if len(words) > 1 and words[1] in COMMANDS else "convert"
    os.environ["COMP_LINE"] = line.replace(f" {name}", "", 1)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda _composed: None)()
