"""One thread for what is computed inside. Knows torch alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, and on as many as before afterwards.

    How many there are changes the order of sums, and with it the last bits of every matrix product. And scaling keeps
    up with the disk on one: more of them spin, and take the core that its writes need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
