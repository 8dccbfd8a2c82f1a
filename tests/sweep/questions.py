"""What the tests of sweeps share: sweep files of their own, and overrides that make the smoke scale quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from upcycle.options.arguments import CONF
from upcycle.sweep.expand import expand
from upcycle.sweep.plan import COMMAND, arm_config, sweep_options

if TYPE_CHECKING:
    from upcycle.train.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
HEADER = {"question": "Which?", "hypothesis": "None.", "metric": "val/loss", "published": "nothing"}


def shipped(name: str, text: Path, *, scale: str = "smoke") -> list[str]:
    """Arguments of a shipped sweep, from the shipped model and the tests' text."""
    return [
        f"+sweeps={name}",
        f"scale={scale}",
        f"source={ROOT / 'models/stdlib-250k'}",
        "data=text",
        f"data.files='{text}/*.txt'",
        "data.held_out=2",
        f"data.cache_dir='{text.parent}/cache'",
        "sweep.seeds=[0]",
    ]


def own(directory: Path, **content: Any) -> list[str]:
    """Arguments for a sweep of the user's own, written below a directory."""
    sweep = HEADER | content.pop("sweep")
    file = directory / "sweeps" / "mine.yaml"
    file.parent.mkdir(exist_ok=True, parents=True)
    plain = {"model": "upcycle", "moe": {"expansion": 2, "granularity": 2, "top_k": 2}, **content, "sweep": sweep}
    file.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(plain)))
    return ["--config-dir", str(directory)]


def configs(name: str, *given: str) -> dict[str, TrainConfig]:
    """Options of every arm of a shipped sweep, composed without a look at its source."""
    overrides = [f"+sweeps={name}", *given]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(COMMAND, overrides=overrides)
        arms = expand(sweep_options(composed))
        return {arm.name: arm_config(arm, overrides, seed=composed.seed) for arm in arms}


def runs(output: Path, name: str) -> dict[str, Path]:
    """Directory of every arm, for a sweep with one seed."""
    index = json.loads((output / f"{name}.json").read_text())["runs"]
    return {each["arm"]: output / directory for directory, each in index.items()}


def status(run: Path) -> str | None:
    """What run.json says."""
    file = run / "run.json"
    return json.loads(file.read_text())["status"] if file.exists() else None
