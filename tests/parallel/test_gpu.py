"""The shipped GPUs, and files of one's own."""

from __future__ import annotations

import pytest
from published import gpu

from upcycle.errors import ConfigError
from upcycle.options.arguments import CONF
from upcycle.parallel.gpu import GpuFile, Group, checked_gpu

FIELDS = (CONF / "gpu" / "h100.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "memory", "dense", "hbm", "nvlink"),
    [("h100", 80, 989.5, 3.35, 900), ("h200", 141, 989.5, 4.8, 900), ("b200", 180, 2250, 8, 1800)],
)
def test_vendors_figures(name, memory, dense, hbm, nvlink):
    """GB, dense TFLOP/s (half of what is advertised, which is with sparsity), TB/s, GB/s both ways."""
    found = gpu(name)
    assert (found.name, found.memory / 1e9, found.flops / 1e12, found.hbm / 1e12) == (name, memory, dense, hbm)
    assert (2 * found.nvlink / 1e9, found.network * 8 / 1e9, found.gpus_per_node) == (nvlink, 400, 8)


def test_every_shipped_gpu_is_tested():
    assert {file.stem for file in (CONF / "gpu").glob("*.yaml")} == {"h100", "h200", "b200", "file"}


@pytest.mark.parametrize(
    ("change", "what", "found"),
    [
        (lambda text: text.replace("hbm:", "hmb:"), "does not describe a GPU", "hbm: Field required"),
        (lambda text: text.replace("80e9", "much"), "does not describe a GPU", "memory"),
        (lambda text: text.replace("80e9", "0"), "gpu.memory is out of range", "0"),
        (lambda text: text.replace("_node: 8", "_node: 0"), "gpu.gpus_per_node is out of range", "0"),
        (lambda text: "{" + text, "cannot be read", "file.yaml"),
        (lambda text: "- 1\n- 2\n", "does not describe a GPU", "file.yaml"),
    ],
)
def test_files_that_are_wrong(tmp_path, change, what, found):
    file = tmp_path / "file.yaml"
    file.write_text(change(FIELDS))
    with pytest.raises(ConfigError) as raised:
        checked_gpu(GpuFile(file=str(file)))
    assert what in str(raised.value)
    assert found in str(raised.value).partition("found:")[2]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        checked_gpu(GpuFile(file=str(tmp_path / "nothing.yaml")))


@pytest.mark.parametrize(
    ("group", "local"),
    [(Group(size=8), 8), (Group(size=16), 8), (Group(size=4, stride=4), 2), (Group(size=2, stride=8), 1)],
)
def test_members_in_a_node(group, local):
    assert group.in_a_node(gpu("h100")) == local
