"""Every remedy that names a command or an option names one that is there, and a value that composes."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import upcycle
from upcycle.cli.app import COMMANDS
from upcycle.errors import UpcycleError
from upcycle.options.arguments import CONF, typed_options
from upcycle.sweep.config import SweepConfig

PACKAGE = Path(upcycle.__file__).parent
MAKEFILE = PACKAGE.parent / "Makefile"
# The functions that make a remedy out of what they are given, and what they say of it.
MADE_BY = ("_remedy", "_other_nodes", "going_on", "other")
HOLE = "\N{BULLET}"  # a value that is known when it is said
NAME = r"\+?[a-z_]+(?:[./][a-z_0-9]+)*"
GIVEN = re.compile(rf"(?<![\w./=-])({NAME})=([^\s,;:)`'\"]*)")
COMMAND = re.compile(r"(?<![\w./])upcycle (?!that\b)([a-z][a-z-]*)")
# Options of analysis in Python, and variables of SLURM.
ELSEWHERE = ("allow", "nproc", "ntasks")
# What a composition needs before the option can be there.
BEFORE = {"data.files": "data=text", "data.attributes": "data=textblob"}
BEFORE |= dict.fromkeys(("data.path", "data.streaming", "data.max_documents"), "data=hf")
LAUNCHER = "hydra.launcher."


def texts() -> list[tuple[str, str]]:
    """Where a remedy is, and what it says; `HOLE` stands for what is not written down."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        said: list[ast.expr] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("remedy", "one"):
                said.append(node.value)
            if isinstance(node, ast.FunctionDef) and node.name in MADE_BY:
                said += [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
        for value in said:
            found += [(f"{file.relative_to(PACKAGE)}:{value.lineno}", text) for text in written(value, constants)]
    return found


def written(value: ast.expr, constants: dict[str, ast.expr]) -> list[str]:
    """The texts that an expression can give, as far as they are written down."""
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            options = [""]
            for part in parts:
                inner = part.value if isinstance(part, ast.FormattedValue) else part
                pieces = written(inner, constants) or [HOLE]
                options = [before + piece for before in options for piece in pieces]
            return options
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in written(left, constants) or [HOLE] for b in written(right, constants) or [HOLE]]
        case ast.IfExp(body=body, orelse=other):
            return written(body, constants) + written(other, constants)
        case ast.Name(id=name) if name in constants:
            return written(constants[name], constants)
        case ast.Dict(values=values):
            return [text for each in values for text in written(each, constants)]
        case ast.Call(func=ast.Attribute(value=inner, attr="get"), args=[_, default]):
            return written(inner, constants) + written(default, constants)
    return []


REMEDIES = texts()


def test_they_are_found() -> None:
    """In keywords, constants, conditions, tables and functions."""
    said = [text for _, text in REMEDIES]
    assert len(said) > 120
    for expected in (
        "set moe.groups=positions, which needs no equal rows",
        "the last checkpoint, if there is one, is whole: go on from it with resume=auto",
        "start again with overwrite=true",
        "convert with target=upcycled_moe, or train with moe.groups=tied, which keeps groups whole in every type",
        f"set target={HOLE}, or target=auto",
    ):
        assert expected in said


@cache
def composed(command: str, *overrides: str) -> DictConfig | str:
    """The options of a command; or why they do not compose."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = compose(command, overrides=list(overrides))
            for name in OmegaConf.missing_keys(config):
                OmegaConf.update(config, name, "x")
            if options := COMMANDS[command].options:
                typed_options(options, config)
        except (HydraException, UpcycleError) as error:
            return f"{command} {' '.join(overrides)}: {error}"
    return config


def options_of(command: str) -> set[str]:
    """All options of a command by their path, groups among them."""
    groups = {each.name for each in CONF.iterdir() if each.is_dir()} | {"hydra/launcher"}
    names: set[str] = set()
    for choices in ((), ("data=text",), ("data=hf",), ("data=attributes",)):
        config = composed(command, *choices)
        if isinstance(config, DictConfig):
            names |= set(paths(OmegaConf.to_container(config, resolve=False, throw_on_missing=False)))
    sweep = {f"sweep.{field.name}" for field in fields(SweepConfig)} if command == "train" else set()
    return names | sweep | groups | {f"+{group}" for group in groups}


def paths(content: Any, prefix: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        found += [prefix + name, *(paths(value, f"{prefix}{name}.") if isinstance(value, dict) else [])]
    return found


KNOWN = {command: options_of(command) for command in COMMANDS}
GROUPS = {name.partition(".")[0] for names in KNOWN.values() for name in names if "." in name} - {"hydra"}


@pytest.mark.parametrize(("where", "text"), REMEDIES, ids=[where for where, _ in REMEDIES])
def test_what_a_remedy_names_is_there(where: str, text: str) -> None:
    for command in COMMAND.findall(text):
        assert command in COMMANDS, f"{where}: there is no upcycle {command}"
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)+)", text):
        assert re.search(rf"^{target}:", MAKEFILE.read_text(), flags=re.MULTILINE), f"{where}: no target {target}"
    for file in re.findall(r"\bconf/[\w/]+\.yaml", text):
        assert (CONF.parent / file).is_file(), f"{where}: there is no {file}"
    for name, value in GIVEN.findall(text):
        if name not in ELSEWHERE:
            works(where, name, value)
    for name in re.findall(r"(?<![\w./])([a-z]+(?:\.[a-z_]+)+)\b(?![=/])", text):
        if name.partition(".")[0] in GROUPS:
            assert any(name in known for known in KNOWN.values()), f"{where}: there is no option {name}"


def works(where: str, name: str, value: str) -> None:
    """Some command has the option; where the value is written down, it takes it."""
    having = [command for command, known in KNOWN.items() if name in known or name.startswith(LAUNCHER)]
    assert having, f"{where}: no command has the option {name}"
    if (
        HOLE in value
        or value.isupper()
        or "..." in value
        or not value
        or name.startswith(("hydra", "+sweeps", "sweep."))
    ):
        return
    before = [BEFORE[name]] if name in BEFORE else []
    tried = (composed(command, *before, f"{name}={value}") for command in having)
    assert any(isinstance(each, DictConfig) for each in tried), f"{where}: {having} do not take {name}={value}"


MUTANTS = ("upcycle resume run=x", "set moe.topk=2", "lower moe.topk", "set checkpoint=first", "set parallel=fsdb")


@pytest.mark.parametrize("text", MUTANTS)
def test_the_mutants(text: str) -> None:
    with pytest.raises(AssertionError, match="mutant"):
        test_what_a_remedy_names_is_there("mutant", text)
