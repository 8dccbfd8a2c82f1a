"""The commands of examples/slurm, as a user gives them, with less to train, on the SLURM of fake_slurm.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from documents import between, commands
from omegaconf import OmegaConf

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytest_plugins = ("text_model",)
ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "examples/slurm/README.md").read_text()


@pytest.mark.slow
def test_the_commands_run(text_model: Path, text: Path, tmp_path: Path) -> None:
    """The second sweep, whose runs take two tasks here, with one arm."""
    data = f"data=text data.files='{text}/*.txt' data.held_out=2 data.cache_dir='{text.parent}/cache'"
    shorter = {
        "scale=smollm2": f"scale=smoke source='{text_model}' {data} sweep.seeds=[0]",
        "batch.micro=4": "batch.micro=2",
        "tasks_per_node=8": "tasks_per_node=1",
        "-m +sweeps=layers scale=smoke": "+arm=baseline seed=0 +sweeps=layers scale=smoke",
    }
    environment = os.environ | fake_slurm.install(tmp_path / "slurm")
    upcycle = str(Path(sys.executable).with_name("upcycle"))
    for line in commands(PAGE):
        for given, replacement in shorter.items():
            if "+arm" not in replacement or "parallel=" in line:
                line = line.replace(given, replacement)
        name, *words = shlex.split(line)
        assert name == "upcycle"
        ended = subprocess.run(
            [upcycle, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    assert (tmp_path / "layers.html").is_file()
    alone, together = (list((tmp_path / "runs").glob(f"{name}/*/run.json")) for name in ("layers", "layers_16"))
    assert [len(json.loads(file.read_text())["ranks"]) for file in alone + together] == [1, 1, 1, 2]
    given = [job["given"] for job in fake_slurm.jobs(tmp_path / "slurm").values()]
    assert [each.get("array") for each in given] == ["0-2%3"] * 3 + [None]
    assert [each["gpus-per-node"] for each in given] == ["1"] * 3 + ["8"]
    assert all(
        job["begun"] == 1 and job["state"] == "COMPLETED" for job in fake_slurm.jobs(tmp_path / "slurm").values()
    )


def test_the_options_are_the_launchers() -> None:
    shipped = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/hydra/launcher/slurm.yaml"))
    assert isinstance(shipped, dict)
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", between(PAGE, "options"), flags=re.MULTILINE)
    for names, values in rows:
        for name, value in zip(
            re.findall(r"`(\w+)`", names), re.split(r", (?!\d+:)", values.replace("`", "")), strict=False
        ):
            assert OmegaConf.create(f"value: {value}").value == shipped.get(name), name
    documented = set(re.findall(r"`(\w+)`", " ".join(names for names, _ in rows)))
    assert set(shipped) - {"defaults", "name"} <= documented
