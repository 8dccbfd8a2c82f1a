"""Evaluates a model: losses on held-out text by domain, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from upcycle.arch.head import CAUSAL, REWARD, attributes_of, head_of
from upcycle.data.corpus import build_corpus
from upcycle.data.rated_corpus import build_rated
from upcycle.errors import ConfigError
from upcycle.evaluation.ahead import ahead_sums
from upcycle.evaluation.harness import Harness
from upcycle.evaluation.losses import domain_losses, perplexity
from upcycle.evaluation.model import load_model
from upcycle.evaluation.scores import attribute_metrics, held_out_scores, row_errors
from upcycle.files.durable import write_text
from upcycle.files.json import json_text
from upcycle.models.heads import check_labels, settle_padding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.evaluation.config import EvaluateConfig

TOKENS_AT_ONCE = 2048


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a model in float32.

    Args:
        config: the options.

    Returns:
        Plain data: by domain, `loss` in nats per token, `perplexity`, `nats_per_byte` and the `tokens` predicted; of a
        model with layers for multi-token prediction, by depth, their `loss` and the share `accepted`; or of a reward
        model, by attribute, `pearson`, `spearman` and `mse`; and the tasks' metrics.

    Raises:
        UpcycleError: a model, data or a task that cannot be used.
    """
    if config.data.held_out == 0:
        raise ConfigError(
            "nothing is held out to evaluate on", found="data.held_out=0", remedy="hold out some documents"
        )
    harness = Harness(config.tasks) if config.tasks else None
    model, tokenizer, length = load_model(config.model, sequence_length=config.sequence_length)
    measure = {CAUSAL.name: _held_out, REWARD.name: _rated}[head_of(model.config.to_dict()).name]
    return {
        "model": config.model,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": "float32",
        "device": model.device.type,
        "sequence_length": length,
        **measure(config, model, tokenizer, length),
        "tasks": harness.run(model, tokenizer, max_length=length) if harness else [],
    }


def _held_out(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
    if config.tokens is not None and config.tokens < length:
        raise ConfigError(
            "tokens do not fill one window",
            found=config.tokens,
            expected=f"at least sequence_length, {length}",
            remedy="raise tokens or lower sequence_length",
        )
    corpus = build_corpus(config.data, tokenizer, sequence_length=length)
    used: dict[str, Any] = {
        "batch_size": max(1, TOKENS_AT_ONCE // length),
        "windows": config.tokens and config.tokens // length,
    }
    ahead = ahead_sums(model, depths=config.mtp_depths)
    losses = domain_losses(model, corpus.held_out, **used, ahead=ahead)
    domains = {
        name: {
            "loss": loss,
            "perplexity": perplexity(loss),
            "nats_per_byte": loss / corpus.bytes_per_token[name],
            "tokens": tokens,
        }
        for name, (loss, tokens) in losses.items()
    }
    measured = enumerate(ahead.measured(), start=2) if ahead else ()
    guesses = [{"tokens_ahead": depth, **each._asdict()} for depth, each in measured]
    more = {"mtp": guesses} if guesses else {}
    return {"data": {"name": config.data.name, "hash": corpus.hash}, "domains": domains, **more}


def _rated(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
    for option, value in (("tasks", config.tasks), ("tokens", config.tokens)):
        if value:
            raise ConfigError(
                f"{option} is for language models",
                found=f"{option}={value} for a reward model",
                remedy=f"leave {option} out",
            )
    check_labels(model.config, config.data.rated())
    settle_padding(model, tokenizer)
    corpus = build_rated(
        config.data,
        tokenizer,
        attributes=attributes_of(model.config),
        padding=model.config.get_text_config().pad_token_id,
        sequence_length=length,
    )
    (rows,) = corpus.held_out.values()
    scores, labels = held_out_scores(model, rows, batch_size=max(1, TOKENS_AT_ONCE // length), rows=None)
    return {
        "data": {"name": config.data.name, "hash": corpus.hash},
        "rows": len(rows),
        "mse": float(row_errors(scores, labels).mean()),
        "attributes": attribute_metrics(scores, labels, corpus.attributes),
    }


def write_evaluation(found: Mapping[str, Any], output: str) -> None:
    """Write the evaluation as JSON; the file appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(Path(output).expanduser(), json_text(found, indent=2) + "\n")


def evaluation_table(found: Mapping[str, Any]) -> RenderableType:
    """The evaluation for people."""
    title = f"{found['model']} ({found['model_type']}, {found['parameters']:,} parameters)"
    if "attributes" in found:
        return _attributes_table(found, title)
    domains = Table(box=box.SIMPLE, title=f"{title}: held-out text, windows of {found['sequence_length']}")
    for column in ("domain", "nats per token", "perplexity", "nats per byte", "tokens"):
        domains.add_column(column, justify="left" if column == "domain" else "right")
    for name, row in found["domains"].items():
        cells = (f"{row['loss']:.5f}", f"{row['perplexity']:.3f}", f"{row['nats_per_byte']:.5f}", f"{row['tokens']:,}")
        domains.add_row(name, *cells)
    tables = [domains, *([_ahead_table(found["mtp"])] if "mtp" in found else [])]
    if not found["tasks"]:
        return Group(*tables)
    tasks = Table(box=box.SIMPLE, title="tasks of the lm-evaluation-harness")
    for column in ("task", "metric", "value", "standard error"):
        tasks.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in found["tasks"]:
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        tasks.add_row(row["task"], row["metric"], f"{row['value']:.4f}", stderr)
    return Group(*tables, tasks)


def _ahead_table(guesses: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, title="multi-token prediction")
    for column in ("tokens ahead", "nats per token", "accepted by the model"):
        table.add_column(column, justify="right")
    for row in guesses:
        table.add_row(str(row["tokens_ahead"]), f"{row['loss']:.5f}", f"{row['accepted']:.2%}")
    return table


def _attributes_table(found: Mapping[str, Any], title: str) -> Table:
    table = Table(box=box.SIMPLE, title=f"{title}: {found['rows']:,} held-out rows, squared error {found['mse']:.5f}")
    for column in ("attribute", "Pearson", "Spearman", "squared error"):
        table.add_column(column, justify="left" if column == "attribute" else "right")
    for name, row in found["attributes"].items():
        shown = ("-" if row[each] is None else f"{row[each]:+.4f}" for each in ("pearson", "spearman"))
        table.add_row(name, *shown, f"{row['mse']:.5f}")
    return table
