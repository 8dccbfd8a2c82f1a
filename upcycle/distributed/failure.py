"""What fails on one rank, said on all. Knows torch.distributed's store."""

from __future__ import annotations

import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import _get_default_store

from upcycle.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from torch._C._distributed_c10d import Store

    from upcycle.distributed.ranks import Ranks

FAILED = "upcycle/failed"
GO_ON = "the last checkpoint, if there is one, is whole: go on from it with resume=auto"
# How gloo and NCCL say that the other end of a connection is gone.
GONE = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "ncclRemoteError",
    "remote process exit",
)


class OtherRankError(TrainingError):
    """This rank ends because another one did."""


@contextmanager
def shared_failure(ranks: Ranks) -> Iterator[None]:
    """Leave word when this rank fails; when another did, end with its error instead of a broken connection.

    Where torchrun ends the others with SIGTERM, they have the time to say so.

    Raises:
        OtherRankError: another rank failed, or was killed.
    """
    if ranks.size == 1:
        yield
        return
    store, before = _get_default_store(), signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, _stay)
        if isinstance(error, OtherRankError):
            raise
        gone = _broken_connection(error) or (str(error) if isinstance(error, SystemExit) and _word(store) else None)
        if gone:
            raise _told(store, ranks, gone) from error
        with suppress(DistError):  # rank 0 is gone too, and the store with it
            store.compare_set(FAILED, "", f"rank {ranks.rank}: {str(error) or type(error).__name__}")
        raise
    signal.signal(signal.SIGTERM, before)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit("stopped by SIGTERM")


def _stay(_number: int, _frame: FrameType | None) -> None:
    """This rank is ending already."""


def _broken_connection(error: BaseException) -> str | None:
    """How an error, or one that it comes from, says that another rank is gone; None if it does not."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, DistNetworkError):
            return str(cause)
        if isinstance(cause, RuntimeError) and any(each in str(cause) for each in GONE):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _word(store: Store) -> str | None:
    """What the first rank that failed has left; None if none has."""
    return store.get(FAILED).decode() if store.check([FAILED]) else None


def _told(store: Store, ranks: Ranks, gone: str) -> OtherRankError:
    try:
        word = _word(store)
    except DistError:
        return OtherRankError(
            "rank 0 is gone",
            found=gone.splitlines()[0],
            expected=f"{ranks.size} ranks",
            remedy=f"see what it said; {GO_ON}",
        )
    if word:
        return OtherRankError("another rank failed", found=word, remedy=GO_ON)
    return OtherRankError(
        "another rank was killed", found=gone.splitlines()[0], expected=f"{ranks.size} ranks", remedy=GO_ON
    )
