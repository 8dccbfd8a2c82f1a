"""A layout of ranks, whichever engine runs it, and what one rank holds of a weight. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upcycle.parallel.gpu import Group

if TYPE_CHECKING:
    from upcycle.parallel.sizes import Weight

Engine = Literal["megatron", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Folding:
    """Attention runs TP x CP x DP x PP, experts ETP x EP x EDP x PP, over the same ranks (arXiv 2504.14960).

    Ranks are numbered as Megatron-Core (tp-cp-ep-dp-pp) and transformers (replicate, fsdp, tp) do: TP and ETP are
    neighbours, then CP and EP, then DP and EDP, then PP; so both numberings have the same pipeline groups.

    Attributes:
        engine: megatron shards optimizer states only (ZeRO-1), transformers all states (FSDP2).
        tp, cp, dp: ranks that split matrices, sequences, the batch.
        etp, ep, edp: ranks that split an expert's matrices, that experts are spread over, copies of the experts.
        pp: pipeline stages.
        replicate: transformers: replicas of the whole (HSDP), of which dp and edp are multiples.
    """

    engine: Engine
    tp: int
    cp: int = 1
    dp: int
    pp: int = 1
    etp: int = 1
    ep: int
    edp: int
    replicate: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def name(self) -> str:
        """The degrees, such as "TP2 CP1 DP8 PP8, ETP1 EP8 EDP2"."""
        if self.engine == "transformers":
            return f"{self.replicate} x FSDP{self.dp // self.replicate} TP{self.tp}, EP{self.ep} EDP{self.edp}"
        attention = f"TP{self.tp} CP{self.cp} DP{self.dp} PP{self.pp}"
        return f"{attention}, ETP{self.etp} EP{self.ep} EDP{self.edp}"

    @property
    def token_ways(self) -> int:
        """Ranks of TP that split the tokens outside of matrices: all with sequence parallelism (arXiv 2205.05198)."""
        return self.tp if self.engine == "megatron" else 1

    @property
    def shared_ways(self) -> int:
        """Ranks of TP that split shared experts; transformers' plans leave them whole."""
        return self.tp if self.engine == "megatron" else 1

    @property
    def shards(self) -> Group:
        """Ranks that shard the states of dense weights."""
        if self.engine == "transformers":
            return Group(size=self.dp // self.replicate, stride=self.tp)
        return Group(size=self.dp * self.cp, stride=self.tp)

    @property
    def expert_shards(self) -> Group:
        """Ranks that shard the states of experts."""
        return Group(size=self.edp // self.replicate, stride=self.etp * self.ep)

    @property
    def replicas(self) -> Group:
        """Ranks that hold the same shards."""
        return Group(size=self.replicate, stride=self.world // self.replicate)

    def split(self, weight: Weight) -> tuple[int, ...]:
        """The shape of the part that a rank computes with."""
        shape = list(weight.shape)
        if weight.kind == "expert":
            shape[0] = math.ceil(shape[0] / self.ep)
        ways = {"dense": self.tp, "shared": self.shared_ways, "expert": self.etp}[weight.kind]
        if weight.split is not None:
            shape[weight.split] = math.ceil(shape[weight.split] / ways)
        return tuple(shape)

    def sharded(self, weight: Weight) -> int:
        """Elements of the part of it whose optimizer states the first rank holds: FSDP2 cuts the first dimension."""
        shape = self.split(weight)
        shards = self.expert_shards.size if weight.kind == "expert" else self.shards.size
        if self.engine == "megatron":
            return math.ceil(math.prod(shape) / shards)
        return math.ceil(shape[0] / shards) * math.prod(shape[1:])
