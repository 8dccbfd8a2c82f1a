"""Which files of a conversion one of several machines writes. Knows the errors only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upcycle.checkpoint import Shard


@dataclass(frozen=True, kw_only=True)
class Part:
    """`part=NUMBER/COUNT`: a range of the files, as many as the others' but for one.

    Attributes:
        number: from 1.
        count: parts of the conversion.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        """The files of this part, possibly none."""
        start, stop = (len(shards) * edge // self.count for edge in (self.number - 1, self.number))
        return tuple(shards[start:stop])

    def all(self) -> list[Part]:
        """This part and the others."""
        return [Part(number=number, count=self.count) for number in range(1, self.count + 1)]


def parse_part(text: str) -> Part:
    """The part that `part` names.

    Raises:
        ConfigError: it names none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError("part is not a part", found=text, expected="I/N with I from 1 to N, such as 2/8")
    return Part(number=int(match[1]), count=int(match[2]))
