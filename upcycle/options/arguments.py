"""Between the shell and Hydra: takes paths literally, and says in our words what Hydra objects to."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from upcycle.errors import ConfigError, UpcycleError, did_you_mean, near_misses

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CONF = Path(__file__).parent.parent / "conf"
MULTIRUN = ("-m", "--multirun")
SWEEPS = "+sweeps"  # what names a file of sweeps/
ARM = "arm"  # of a sweep, to run it alone
EXTRA_LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")  # slurm is the last one with other values
BESIDE = ("hydra", "sweep", ARM)  # what of a composed config is no option of the command

# What an arm needs to differ from a scale by a factor: `${times:${schedule.peak},0.3}`.
OmegaConf.register_new_resolver("times", lambda one, other: one * other, replace=True)
# And to keep what a scale may have set: `${first:${batch.micro},4}`.
OmegaConf.register_new_resolver("first", lambda one, other: other if one is None else one, replace=True)


def literal_paths(options: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """Quote the values of path options that Hydra's grammar would not read as that text, such as `~/x`, `a=b` or `2`.

    What is quoted already, `null`, and the sweeps of a multirun stay as they are.
    """
    sweeping = is_sweep(arguments)
    return [_literal(argument, sweeping) if argument.split("=")[0] in options else argument for argument in arguments]


def file_choices(groups: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """Spell `GROUP=FILE` as Hydra knows it: `GROUP=file GROUP.file=FILE`, for groups that take a YAML file too."""
    spelt: list[str] = []
    for argument in arguments:
        group, _, value = argument.partition("=")
        is_file = group in groups and Path(value).suffix in (".yaml", ".yml")
        spelt += [f"{group}=file", f"{group}.file={quoted(value)}"] if is_file else [argument]
    return spelt


def sweep_choice(argument: str) -> str:
    """Spell `sweeps/NAME` or `sweeps/NAME.yaml` as Hydra knows it: `+sweeps=NAME`. Other arguments stay as they are."""
    named = re.fullmatch(r"sweeps/([^/=]+?)(\.yaml)?", argument)
    return f"{SWEEPS}={named[1]}" if named else argument


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra will run the command over several values."""
    return any(argument in MULTIRUN or argument.upper() == "HYDRA.MODE=MULTIRUN" for argument in arguments)


def names_sweep(arguments: Sequence[str]) -> bool:
    """Whether the arms of a file of `sweeps/` are to run, which expands them itself: in a multirun, or one by name."""
    one = any(argument.lstrip("+").startswith(f"{ARM}=") for argument in arguments)
    return (one or is_sweep(arguments)) and any(argument.startswith(f"{SWEEPS}=") for argument in arguments)


def without_multirun(arguments: Sequence[str]) -> list[str]:
    """The arguments without what asks for a multirun."""
    return [argument for argument in arguments if not is_sweep([argument])]


def _literal(argument: str, sweeping: bool) -> str:
    key, _, value = argument.partition("=")
    literal = f"{key}={quoted(value)}"
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException:
        return literal
    if parsed.is_sweep_override():
        return argument if sweeping or not Path(value).exists() else literal
    return argument if parsed.value() is None or isinstance(parsed.value(), str) else literal


def quoted(text: str) -> str:
    """The text as Hydra's grammar writes a string."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def readable(error: Exception, command: str) -> str:
    """An error that is not a bug, in words for the user of `upcycle COMMAND`."""
    if isinstance(error, UpcycleError):
        return str(error)
    group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
    if name in EXTRA_LAUNCHERS:
        return str(_not_installed(name))
    if isinstance(error, MissingConfigException) and error.options:
        known = list(error.options)
        return str(
            ConfigError(
                f"unknown value for {group}", found=name, expected=", ".join(known), remedy=did_you_mean(name, known)
            )
        )
    if isinstance(error, OverrideParseException):
        return str(_unreadable(error))
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    unknown = re.match(r"Could not override '(.+?)'", str(error))
    if unknown:
        return str(_unknown_option(unknown[1], command))
    return "\n  ".join(line.strip() for line in str(error).splitlines() if line.strip())


def typed_options(kind: type, composed: DictConfig) -> Any:
    """Merge a composed config into its frozen dataclass.

    Raises:
        ConfigError: a required option is missing, one is unknown, or a value has the wrong type.
    """
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in BESIDE])
    missing = sorted(OmegaConf.missing_keys(own))
    if missing:
        raise _missing(missing[0])
    plain: Any = OmegaConf.to_container(own, resolve=True)
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        name = _option(first["loc"], plain)
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError("unknown option", found=name, remedy="leave it out") from error
        if first["type"].startswith("missing"):
            raise _missing(name) from error
        found = "null" if first["input"] is None else first["input"]
        expected = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{name} is not valid", found=found, expected=expected) from error


def options_of(kind: type, command: str, **named: object) -> Any:
    """The options of another command than the one that runs: its defaults, and what is named.

    Raises:
        ConfigError: as for `typed_options`.
    """
    overrides = [f"{name}={quoted(str(value))}" for name, value in named.items()]
    return typed_options(kind, hydra.compose(config_name=command, overrides=overrides))


def _option(location: Sequence[int | str], plain: Any) -> str:
    """The name of the option that pydantic objects to, without the tags of unions."""
    names = []
    for part in location:
        inside = isinstance(plain, dict) and part in plain
        if inside or part == location[-1]:
            names.append(str(part))
        plain = plain[part] if inside else plain
    return ".".join(names)


def _missing(name: str) -> ConfigError:
    return ConfigError(
        "a required option is missing", found="nothing", expected=f"{name}=…", remedy=f"add {name}=VALUE"
    )


def _not_installed(launcher: str) -> ConfigError:
    return ConfigError(
        "the launcher is not installed",
        found=launcher,
        expected="the extra `sweep`",
        remedy='pip install "upcycle[sweep]"',
    )


def _unreadable(error: OverrideParseException) -> ConfigError:
    key, equals, value = error.override.partition("=")
    if not equals:
        return ConfigError("cannot read an argument", found=error.override, expected="key=value")
    return ConfigError(
        "cannot read an argument",
        found=error.override,
        expected="key=value in Hydra's grammar",
        remedy=f'quote the value, with the quotes inside the shell\'s: "{key}={quoted(value)}"',
    )


def _unknown_option(key: str, command: str) -> ConfigError:
    known = _known_keys(command)
    remedy = f"`upcycle {command} --help` lists the options"
    if key in known:
        return ConfigError(f"{key} does not apply here", found=key, expected=f"{key} with {known[key]}", remedy=remedy)
    return ConfigError("unknown option", found=key, expected=near_misses(key, known), remedy=remedy)


def _known_keys(command: str) -> Mapping[str, str]:
    """Every option of a command -> the choices of a group that have it, such as "init=drop"."""
    keys: dict[str, str] = {}
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = hydra.compose(config_name=command)
    for name, value in composed.items_ex(resolve=False):
        key = str(name)
        group = sorted((CONF / key).glob("*.yaml"))
        choices = {file.stem: OmegaConf.load(file) for file in group} or {"": value}
        for chosen, options in choices.items():
            inner = [f"{key}.{field!s}" for field in options] if isinstance(options, DictConfig) else [key]
            for each in inner:
                keys[each] = f"{keys[each]} or {key}={chosen}" if each in keys else f"{key}={chosen}"
    return keys
