"""Published training runs of mixtures of experts on H100: models, foldings, and the MFU that was measured.

A: arXiv 2504.14960, tables 3 (256 sequences), 4 (1,024 sequences, more GPUs) and 5 (longer sequences; its rows of
Qwen2-57B-A14B repeat those of Mixtral 8x22B and are left out, and so is the first row of Llama3-8x70B in table 4, whose
number of GPUs is unclear). Where a mapping has no ETP, it is that of attention's TP. B: arXiv 2412.09952, table 2,
which does not state the batch; 512 sequences are assumed here. Its capacity factors of 2 and 4 are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.options.arguments import CONF
from upcycle.parallel.config import FoldingConfig, WorkloadConfig
from upcycle.parallel.gpu import Gpu, GpuFile, checked_gpu
from upcycle.parallel.search import Request
from upcycle.parallel.sizes import ModelSizes

_MIXTRAL = {
    "layers": 56,
    "moe_layers": 56,
    "hidden": 6144,
    "heads": 48,
    "kv_heads": 8,
    "head_size": 128,
    "ffn_width": 16384,
    "vocab": 32768,
}
_LLAMA3 = {"kv_heads": 8, "head_size": 128, "vocab": 128256, "experts": 8, "top_k": 2}
MODELS = {
    "Mixtral 8x22B": ModelSizes(**_MIXTRAL, experts=8, top_k=2, expert_width=16384),
    "Mixtral 8x22B-G8T8": ModelSizes(**_MIXTRAL, experts=64, top_k=8, expert_width=2048),
    "Qwen2-57B-A14B": ModelSizes(
        layers=28,
        moe_layers=28,
        hidden=3584,
        heads=28,
        kv_heads=4,
        head_size=128,
        ffn_width=18944,
        vocab=151936,
        experts=64,
        top_k=8,
        expert_width=2560,
        shared_width=20480,
        qkv_bias=True,
    ),
    "Llama3-8x70B": ModelSizes(
        **_LLAMA3, layers=80, moe_layers=80, hidden=8192, heads=64, ffn_width=28672, expert_width=28672
    ),
    "Llama 3 8B E8T2": ModelSizes(
        **_LLAMA3, layers=32, moe_layers=32, hidden=4096, heads=32, ffn_width=14336, expert_width=14336
    ),
}


def gpu(name: str) -> Gpu:
    """One of `conf/gpu/`."""
    return checked_gpu(GpuFile(file=str(CONF / "gpu" / f"{name}.yaml")))


def workload(sequences: int = 256, micro: int = 1, length: int = 4096, *, recompute: bool = False) -> WorkloadConfig:
    return WorkloadConfig(sequences=sequences, micro=micro, sequence_length=length, activation_checkpointing=recompute)


def folding(
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    etp: int | None = None,
    ep: int | None = None,
) -> FoldingConfig:
    return FoldingConfig(tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run; `best` of its model's foldings at 256 sequences."""

    model: str
    gpus: int
    folding: FoldingConfig
    sequences: int
    length: int
    mfu: float
    source: str
    best: bool = False

    def request(self, parallel: FoldingConfig) -> Request:
        """The run's model, step and GPUs, in a layout."""
        return Request(
            parallel=parallel,
            sizes=MODELS[self.model],
            workload=workload(self.sequences, length=self.length),
            gpu=gpu("h100"),
            nodes=self.gpus // 8,
        )


def _run(
    model: str,
    gpus: int,
    degrees: tuple[int, int, int, int, int],
    mfu: float,
    *,
    sequences: int = 256,
    length: int = 4096,
    source: str = "A3",
    best: bool = False,
) -> Run:
    return Run(
        model=model,
        gpus=gpus,
        folding=folding(*degrees),
        sequences=sequences,
        length=length,
        mfu=mfu,
        source=source,
        best=best,
    )


_BEST = {
    "Mixtral 8x22B": (2, 1, 8, 1, 8),
    "Mixtral 8x22B-G8T8": (4, 1, 8, 1, 8),
    "Qwen2-57B-A14B": (2, 1, 4, 1, 4),
    "Llama3-8x70B": (8, 1, 16, 1, 8),
}
_SCALED = {
    "Mixtral 8x22B": {128: 52.2, 256: 50.7, 512: 48.9, 1024: 44.9},
    "Mixtral 8x22B-G8T8": {128: 30.0, 256: 29.3, 512: 26.7, 1024: 25.5},
    "Qwen2-57B-A14B": {64: 39.9, 128: 39.7, 256: 38.1, 512: 36.6, 1024: 33.4},
    "Llama3-8x70B": {512: 42.7, 1024: 41.5},
}
# TP, CP, PP, ETP, EP; MFU in percent
RUNS = [
    _run("Mixtral 8x22B", 128, (4, 1, 1, 4, 8), 36.6),
    _run("Mixtral 8x22B", 128, (2, 1, 8, 2, 4), 46.3),
    _run("Mixtral 8x22B", 128, _BEST["Mixtral 8x22B"], 49.3, best=True),
    _run("Mixtral 8x22B-G8T8", 128, (8, 1, 1, 8, 8), 8.7),
    _run("Mixtral 8x22B-G8T8", 128, (2, 1, 8, 2, 8), 17.1),
    _run("Mixtral 8x22B-G8T8", 128, _BEST["Mixtral 8x22B-G8T8"], 28.8, best=True),
    _run("Qwen2-57B-A14B", 64, (4, 1, 1, 4, 4), 23.1),
    _run("Qwen2-57B-A14B", 64, (2, 1, 4, 2, 4), 35.3),
    _run("Qwen2-57B-A14B", 64, _BEST["Qwen2-57B-A14B"], 39.0, best=True),
    _run("Llama3-8x70B", 256, (8, 1, 8, 8, 4), 38.8),
    _run("Llama3-8x70B", 256, _BEST["Llama3-8x70B"], 41.6, best=True),
    _run("Llama 3 8B E8T2", 128, (1, 2, 4, 1, 8), 46.8, sequences=512, length=8192, source="B2", best=True),
    _run("Llama 3 8B E8T2", 128, (2, 2, 4, 1, 8), 39.6, sequences=512, length=8192, source="B2, dropless"),
    *(
        _run(model, gpus, _BEST[model], mfu, sequences=1024, source="A4")
        for model, scaled in _SCALED.items()
        for gpus, mfu in scaled.items()
    ),
    _run("Mixtral 8x22B", 128, (2, 4, 8, 1, 8), 47.6, sequences=1024, length=16384, source="A5"),
    _run("Mixtral 8x22B", 256, (2, 8, 8, 1, 8), 45.1, sequences=512, length=32768, source="A5"),
    _run("Mixtral 8x22B", 512, (4, 8, 8, 1, 8), 44.5, sequences=256, length=65536, source="A5"),
    _run("Mixtral 8x22B", 1024, (8, 8, 8, 1, 8), 42.9, sequences=128, length=131072, source="A5"),
]
