"""Which kernel a model gets, that it really uses it, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from expert_cases import assert_same
from kernel_models import MODELS, build, gradients
from models import build as build_dense

from upcycle.errors import ConfigError
from upcycle.kernels import megablocks, triton_ops
from upcycle.kernels.loop import loop
from upcycle.kernels.select import KERNELS, NAMES, Choice, experts_modules, install_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_with_every_kernel(name):
    model = build(name)
    expected = gradients(model, "reference")
    assert len(expected) > 10
    for kernel in ("loop", "fused"):
        assert_same(gradients(model, kernel), expected, 1e-10)
    model.float()
    expected = gradients(model, "reference")
    assert_same(gradients(model, "grouped_mm"), expected, 1e-4)
    with torch.no_grad():
        experts_modules(model)[1].down_proj.mul_(1.01)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(gradients(model, "fused"), expected, 1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", ["reference", "loop", "fused", "grouped_mm"])
def test_the_model_really_uses_it(name, kernel, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(kernel)
        return loop(*arguments)

    monkeypatch.setitem(KERNELS, kernel, replace(KERNELS[kernel], forward=counted))
    model = build(name, torch.float32)
    install_kernel(model, kernel, device=CPU, dtype=torch.float32)
    model(torch.arange(3, 9)[None])
    assert len(calls) == len(experts_modules(model)) == 2


def test_the_choice_is_told(caplog):
    caplog.set_level(logging.INFO, logger="upcycle")
    model = build("mixtral", torch.float32)
    assert install_kernel(model, "auto", device=CPU, dtype=torch.float32).name == "fused"
    assert install_kernel(model, "loop", device=CPU, dtype=torch.float32) == Choice(name="loop", why="asked for")
    assert caplog.messages == ["kernel fused: the fastest on a CPU", "kernel loop: asked for"]


def test_auto_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    model = build("mixtral", torch.bfloat16)
    choice = install_kernel(model, "auto", device=GPU, dtype=torch.bfloat16)
    assert choice == Choice(name="grouped_mm", why="needs nothing installed on cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    choice = install_kernel(model, "auto", device=GPU, dtype=torch.bfloat16)
    assert choice == Choice(name="loop", why="works everywhere; kernel=grouped_mm needs a newer GPU")


def test_names():
    assert set(NAMES) == {"auto", "reference", "loop", "fused", "grouped_mm", "megablocks", "emulated"}


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "messages"),
    [
        ("groupd_mm", CPU, torch.float32, ["unknown kernel", "did you mean grouped_mm"]),
        ("fused", GPU, torch.float32, ["made for the CPU", "device cuda"]),
        ("megablocks", CPU, torch.float32, ["runs on GPUs only", "device cpu", "kernel=auto"]),
        ("grouped_mm", CPU, torch.float64, ["does not compute in this dtype", "torch.float64"]),
    ],
)
def test_what_cannot_serve_is_refused(kernel, device, dtype, messages, monkeypatch):
    monkeypatch.setattr(megablocks, "why_missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError) as error:
        install_kernel(build("mixtral"), kernel, device=device, dtype=dtype)
    for message in messages:
        assert message in str(error.value)


def test_a_missing_kernel_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(megablocks, "why_missing", lambda: "ImportError: No module named 'stk'")
    with pytest.raises(ConfigError, match=r"not installed[\s\S]*No module named 'stk'[\s\S]*make install-megablocks"):
        install_kernel(build("mixtral"), "megablocks", device=GPU, dtype=torch.bfloat16)


def test_what_breaks_on_import_is_missing(monkeypatch):
    def broken(_name):
        raise RuntimeError("no driver")

    triton_ops.triton_ops.cache_clear()
    monkeypatch.setattr(triton_ops, "import_module", broken)
    assert triton_ops.why_missing() == "RuntimeError: no driver"


def test_widths_that_grouped_mm_cannot_take_are_refused():
    model = build("mixtral", torch.bfloat16)
    for experts in experts_modules(model):
        experts.down_proj = torch.nn.Parameter(torch.zeros(6, 32, 20, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"rows of a multiple of 16 bytes[\s\S]*20, 32[\s\S]*multiples of 8"):
        install_kernel(model, "grouped_mm", device=CPU, dtype=torch.bfloat16)


def test_a_foreign_layout_is_refused():
    model = build("mixtral", torch.float32)
    experts_modules(model)[1].is_transposed = True
    with pytest.raises(ConfigError, match=r"does not know the layout[\s\S]*MixtralExperts with is_transposed"):
        install_kernel(model, "fused", device=CPU, dtype=torch.float32)


def test_a_gate_of_its_own_is_refused_by_megablocks(monkeypatch):
    monkeypatch.setattr(megablocks, "why_missing", lambda: None)
    model = build("mixtral", torch.bfloat16)
    monkeypatch.setattr(type(experts_modules(model)[0]), "_apply_gate", lambda self, z: z.chunk(2, -1)[0])
    with pytest.raises(ConfigError, match="knows act"):
        install_kernel(model, "megablocks", device=GPU, dtype=torch.bfloat16)


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match=r"no experts[\s\S]*LlamaForCausalLM"):
        install_kernel(build_dense("llama"), "auto", device=CPU, dtype=torch.float32)
