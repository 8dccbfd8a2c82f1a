"""Options of `upcycle train`, `export`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from upcycle.data.config import DataConfig
from upcycle.options.config import STRICT, InitConfig, MoeConfig
from upcycle.parallel.config import AnyGpu, AnyParallel, FoldingConfig
from upcycle.precision.config import QuantiseConfig
from upcycle.routing.config import BalanceConfig, RouterConfig
from upcycle.tracking.config import WandbConfig

ModelKind = Literal["dense", "upcycle", "scratch", "checkpoint"]
ObjectiveKind = Literal["causal_lm", "regression"]


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """`budget.*`: exactly one is given; the others follow, rounded to whole steps.

    Attributes:
        steps: optimizer steps.
        tokens: tokens to train on.
        flops: training FLOPs, analytic, so that arms with different models can be given the same.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    steps: int | None
    tokens: float | None
    flops: float | None


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """`batch.*`.

    Attributes:
        sequences: sequences per optimizer step, over all ranks and micro-batches.
        micro: sequences per forward pass and rank; null takes them all at once.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    sequences: int
    micro: int | None

    def micro_sequences(self, data_ranks: int) -> int:
        """Sequences per forward pass and rank."""
        return self.micro or self.sequences // data_ranks


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """`optim.*`: AdamW; norms, routers and biases are not decayed.

    Attributes:
        weight_decay: decoupled weight decay.
        beta1, beta2, eps: AdamW's.
        clip: largest L2 norm of the gradient; null does not clip.
        router_lr: factor on the learning rate of routers.
        expert_lr: factor on the learning rate of experts.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip: float | None
    router_lr: float
    expert_lr: float


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """`schedule.*`: the learning rate by step; `name` says which fields matter.

    Attributes:
        name: cosine, wsd, constant or reset.
        peak: learning rate after the warm-up.
        final: learning rate at the end of the decay.
        warmup: steps of linear warm-up; below 1, a share of the budget.
        decay: wsd: steps of the final linear decay; below 1, a share of the budget.
        steps, tokens: reset: length of the cosine from peak to final, in either unit; the budget where both are null.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: Literal["cosine", "wsd", "constant", "reset"]
    peak: float
    warmup: float
    final: float = 0.0
    decay: float = 0.0
    steps: int | None = None
    tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """`distill.*`: knowledge distillation from the dense source (Hinton et al., arXiv 1503.02531).

    Attributes:
        weight: of the KL term, times temperature squared; 1 - weight is left to the cross entropy. 0 is off.
        temperature: divides the logits of both models.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    weight: float
    temperature: float


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """`validation.*`.

    Attributes:
        every: optimizer steps between validations; one comes before the first step and one after the last too.
        windows: windows per domain that are used; null takes all.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    every: int
    windows: int | None


@dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """`mtp.*`: a block that predicts tokens after the next one (multi-token prediction, arXiv 2412.19437).

    Attributes:
        start: none (no block), keep (the source's), copy (of the model's last layers, with its output as input) or
            random.
        depths: how many further tokens; the block is applied once for each (arXiv 2512.20856).
        weight: of their mean cross entropy, which is added to the next token's.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    start: str
    depths: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`upcycle train`.

    Attributes:
        model: dense, upcycle, scratch or checkpoint.
        objective: causal_lm, or regression: scores of attributes, by a reward model or a new head on a language model.
        source: the dense model (of the experts too); for checkpoint, the directory to train.
        architecture: scratch: fields of a transformers configuration; null takes the MoE that `source` and `moe` make.
        tokenizer: directory or Hub id; "bytes" for bytes; null takes the source's.
        output: directory of the run.
        resume: auto continues a run that was interrupted; never refuses an output that exists.
        overwrite: delete an earlier run at `output`.
        seed: of routers, noise, random weights and the order of the data.
        target, calibration_tokens, moe, init: as for `upcycle convert`.
        kernel: expert kernel by name.
        router, balance: routing and its balancing.
        data, sequence_length: the text, and tokens per sequence.
        budget, batch, optim, schedule, distill, mtp, validation: see their classes.
        precision: float32, bfloat16 (mixed: weights and optimizer stay in float32), or a recipe of low precision.
        quantise: what such a recipe applies to, and its switches.
        device: auto, cpu or cuda.
        activation_checkpointing: recompute activations in the backward pass.
        compile: torch.compile the model.
        log_every: optimizer steps between rows of the record.
        checkpoint_every: optimizer steps between checkpoints.
        metrics: off, cheap (routing statistics), or dense (similarity of experts, at every validation).
        peak_flops: FLOP/s that MFU is measured against; null leaves MFU out.
        workers: processes that read data.
        progress: show a progress bar.
        wandb: the mirror of the record at Weights & Biases.
        parallel: how several ranks share the model and the batch; null is one process.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: ModelKind
    source: str | None
    architecture: dict[str, Any] | None
    tokenizer: str | None
    output: str
    resume: Literal["auto", "never"]
    overwrite: bool
    seed: int
    target: str
    calibration_tokens: int
    moe: MoeConfig
    init: InitConfig
    kernel: str
    router: RouterConfig
    balance: BalanceConfig
    data: DataConfig
    sequence_length: int
    budget: BudgetConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    distill: DistillConfig
    mtp: MtpConfig
    validation: ValidationConfig
    precision: str
    quantise: QuantiseConfig
    device: Literal["auto", "cpu", "cuda"]
    activation_checkpointing: bool
    compile: bool
    log_every: int
    checkpoint_every: int
    metrics: Literal["off", "cheap", "dense"]
    peak_flops: float | None
    workers: int
    progress: bool
    wandb: WandbConfig
    parallel: AnyParallel | None = None
    objective: ObjectiveKind = "causal_lm"


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """`workload.*` of `upcycle export`: the training step of a recipe; null is what the run or training has.

    Attributes:
        sequences: per optimizer step, over all ranks and micro-batches.
        micro: sequences per forward pass and rank; 1 where the run has none.
        sequence_length: tokens per sequence.
        activation_checkpointing: recompute the activations of every layer in the backward pass.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    sequences: int | None = None
    micro: int | None = None
    sequence_length: int | None = None
    activation_checkpointing: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`upcycle export`.

    Attributes:
        run: directory of a run.
        output: directory of the Hugging Face checkpoint.
        checkpoint: last or best.
        dtype: float32, bfloat16 or float16.
        overwrite: replace an existing output.
        portable: also write what other engines need and what changes nothing, such as biases of zeros.
        format: huggingface; or megatron-bridge, with a recipe beside the checkpoint. What follows is for that.
        moe: directory of a MoE checkpoint, instead of a run.
        steps: optimizer steps of the recipe; null takes the run's.
        parallel: the folding; null is the best that fits.
        gpu: what it runs on.
        nodes: of `gpu.gpus_per_node` GPUs.
        workload: the training step.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    run: str | None
    output: str
    checkpoint: Literal["last", "best"]
    dtype: Literal["float32", "bfloat16", "float16"]
    overwrite: bool
    portable: bool = True
    format: Literal["huggingface", "megatron-bridge"] = "huggingface"
    moe: str | None = None
    steps: int | None = None
    parallel: FoldingConfig | None = None
    gpu: AnyGpu | None = None
    nodes: int = 1
    workload: RecipeConfig = RecipeConfig()
