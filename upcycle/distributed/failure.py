"""What fails on one rank, said on all. Knows torch.distributed's store."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import _get_default_store

from upcycle.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.distributed.ranks import Ranks

FAILED = "upcycle/failed"
GO_ON = "the last checkpoint is whole: go on from it with resume=auto"
# How gloo and NCCL say that the other end of a connection is gone.
GONE = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited", "NCCL")


@contextmanager
def shared_failure(ranks: Ranks) -> Iterator[None]:
    """Leave word when this rank fails; when another did, end with its error instead of a broken connection.

    Raises:
        TrainingError: another rank failed, or was killed.
    """
    if ranks.size == 1:
        yield
        return
    store = _get_default_store()
    try:
        yield
    except BaseException as error:
        broken = isinstance(error, RuntimeError) and any(each in str(error) for each in GONE)
        if broken and store.check([FAILED]):
            raise TrainingError("another rank failed", found=store.get(FAILED).decode(), remedy=GO_ON) from error
        if broken:
            raise TrainingError(
                "another rank was killed",
                found=str(error).splitlines()[0],
                expected=f"{ranks.size} ranks",
                remedy=GO_ON,
            ) from error
        store.set(FAILED, f"rank {ranks.rank}: {str(error) or type(error).__name__}")
        raise
