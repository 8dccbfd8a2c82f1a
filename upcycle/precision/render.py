"""A plan of low precision for people and for machines."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from upcycle.precision.planning import PrecisionPlan
    from upcycle.precision.quantise import Scaling
    from upcycle.precision.recipes import Recipe


def precision_table(plan: PrecisionPlan) -> Table:
    """Neighbouring layers in which the same is in low precision, and what that takes on a GPU."""
    table = Table(box=box.SIMPLE, title=f"precision {plan.recipe.name}", caption=_caption(plan))
    for column in ("layers", "in low precision", "as it is", "parameters in it"):
        table.add_column(column, justify="right" if column.startswith("param") else "left")
    for (sites, parameters), run in groupby(plan.layers, lambda each: (tuple(each.sites.items()), each.parameters)):
        indices = [each.layer for each in run]
        name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        low, high = (", ".join(site for site, lowered in sites if lowered is kind) for kind in (True, False))
        table.add_row(name, low, high, f"{parameters:,}" if low else "")
    return table


def _caption(plan: PrecisionPlan) -> str:
    every, low = plan.parameters
    said = ", ".join(f"{name} {written}" for name, written in operands(plan.recipe).items())
    lines = [
        f"{said}; the router, head, embeddings, norms and latent projections never",
        f"{low:,} of {every:,} parameters, {plan.bytes_per_parameter:.3g} bytes each on a GPU (bfloat16: 2)",
    ]
    if plan.padded:
        lines.append(
            f"tokens of each expert padded to {plan.recipe.tokens}: about {100 * plan.padded:.2g} % more rows "
            f"at {plan.tokens:,} tokens a micro-batch"
        )
    major, minor = plan.recipe.capability
    lines.append(f"in hardware from CUDA capability {major}.{minor} on; emulated anywhere")
    return "\n".join(lines)


def operands(recipe: Recipe) -> dict[str, str]:
    """How a recipe writes x, W and dy, in words."""
    kinds = {"x": recipe.activation, "W": recipe.weight, "dy": recipe.gradient}
    switches = [name for name, on in (("stochastic", recipe.stochastic), ("rotated for dW", recipe.hadamard)) if on]
    written = {name: _written(scaling) for name, scaling in kinds.items()}
    written["dy"] += "".join(f", {each}" for each in switches)
    return written


def _written(scaling: Scaling) -> str:
    rows, columns = scaling.block
    block = "" if scaling.scale == "none" else " a matrix" if columns < 0 else f" {rows}x{columns}"
    return f"{scaling.format.name}{block}"


def precision_json(plan: PrecisionPlan) -> dict[str, Any]:
    """Everything that the table says."""
    return {
        "recipe": plan.recipe.name,
        "operands": operands(plan.recipe),
        "layers": [{"layer": each.layer, "sites": each.sites, "parameters": each.parameters} for each in plan.layers],
        "parameters": plan.parameters[0],
        "parameters_in_low_precision": plan.parameters[1],
        "bytes_per_parameter": plan.bytes_per_parameter,
        "padded": plan.padded,
        "padded_to": plan.recipe.tokens,
        "tokens_per_micro_batch": plan.tokens,
        "capability": list(plan.recipe.capability),
    }
