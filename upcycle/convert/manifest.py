"""`upcycle_manifest.json`: where every tensor of a checkpoint comes from."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from upcycle.models.manifest import FORMAT
from upcycle.plan.plan import plan_dict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.convert.prepare import Conversion
    from upcycle.options.config import ConvertConfig

PACKAGES = ("upcycle", "torch", "transformers", "safetensors")
WHERE_NOT_WHAT = ("output", "overwrite", "resume", "max_shard_size", "workers", "part", "verify")


def manifest_json(conversion: Conversion, config: ConvertConfig, hashes: Mapping[str, str]) -> str:
    """The manifest's text; the same for the same source, config and seed, whatever the output and the shard size.

    Args:
        conversion: what was executed.
        config: the resolved options; those that say where and not what are left out.
        hashes: SHA-256 of the source's files by name.
    """
    described = plan_dict(conversion.plan)
    options = {name: value for name, value in asdict(config).items() if name not in WHERE_NOT_WHAT}
    content = {
        "format": FORMAT,
        "source": {
            "given": config.source,
            "model_type": conversion.source.model.family.model_type,
            "sha256": dict(hashes),
        },
        "config": options,
        "seed": config.seed,
        "plan_sha256": conversion.plan.fingerprint(),
        "versions": versions(),
        "cost": asdict(conversion.cost),
        **({"latent": described["latent"]} if "latent" in described else {}),
        **{name: described[name] for name in ("target", "why", "moe", "init", "losses", "notes", "scaling", "dropped")},
        "tensors": {name: tensor["from"] for name, tensor in described["tensors"].items()},
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def versions() -> dict[str, str]:
    """What the values of a checkpoint depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
