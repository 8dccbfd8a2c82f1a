"""The block for multi-token prediction of a model that is to be trained: where it comes from, or that there is none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, SourceError
from upcycle.models.ahead import ahead_family, attach, detach, load_block

if TYPE_CHECKING:
    from upcycle.distributed.ranks import Ranks
    from upcycle.train.config import MtpConfig
    from upcycle.train.start import Start

STARTS = ("none", "keep", "copy", "random")
_log = logging.getLogger("upcycle")


def check_ahead_options(mtp: MtpConfig) -> None:
    """Check `mtp.*`.

    Raises:
        ConfigError: an unknown start, or a number out of range.
    """
    if mtp.start not in STARTS:
        raise ConfigError("unknown mtp.start", found=mtp.start, expected=", ".join(STARTS))
    if mtp.depths < 1:
        raise ConfigError("mtp.depths is out of range", found=mtp.depths, expected="1 or more")
    if not mtp.weight >= 0:
        raise ConfigError("mtp.weight must not be negative", found=mtp.weight)


def settle_ahead(start: Start, mtp: MtpConfig, ranks: Ranks) -> None:
    """Give the model the block that the options ask for, or say in its configuration that it has none.

    Raises:
        ConfigError: its family has no such layers, or nothing to copy; several ranks.
        SourceError: the source's are to be kept, and there are none.
    """
    if mtp.start == "none":
        if detach(start.model):
            _log.warning("mtp.start=none: the layers for multi-token prediction are left out of what is trained")
        return
    if ranks.size > 1:
        raise ConfigError(
            "multi-token prediction is trained by one process",
            found=f"mtp.start={mtp.start} on {ranks.size} ranks",
            remedy="set mtp.start=none",
        )
    if mtp.start == "keep":
        if start.origin is None or load_block(start.model, start.origin) is None:
            raise SourceError(
                "mtp.start=keep needs a source with layers for multi-token prediction",
                found=str(start.origin),
                remedy="set mtp.start=copy or random",
            )
        return
    config: Any = start.model.config
    family = ahead_family(config)
    own = family.layer_kinds(config.to_dict(), 0)
    experts = any(family.kinds[kind].experts for kind in own)
    attention = next(name for name, kind in family.kinds.items() if kind.mixer == "attention")
    ffn = next(name for name, kind in family.kinds.items() if (kind.experts if experts else kind.ffn))
    block = attach(start.model, (attention, ffn))
    if mtp.start == "copy":
        block.start_from(start.model)
