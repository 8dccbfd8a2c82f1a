"""Windows of a packed token stream as a torch dataset. Legend: L sequence length, D documents, T tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Windows(Dataset[dict[str, Tensor]]):
    """Window i holds tokens i*L to i*L+L, of which the first L are read and the last L predicted.

    An item has `input_ids` [L] and `labels` [L], both int64, where labels[t] is the token after input_ids[t], and with
    `document_attention` `position_ids` [L], which begin at 0 with the window and with every document. transformers
    keeps documents apart by them, provided that it gets no attention_mask and no cache (`use_cache=False`).

    Args:
        tokens: [T], documents one after the other; what does not fill a window at the end is not used.
        starts: [D], index of every document's first token, ascending.
        sequence_length: L.
        document_attention: whether to give `position_ids`.
    """

    def __init__(
        self, tokens: NDArray[Any], starts: NDArray[np.int64], *, sequence_length: int, document_attention: bool
    ) -> None:
        self.tokens, self.starts = tokens, starts
        self.sequence_length, self.document_attention = sequence_length, document_attention

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.sequence_length
        window = torch.from_numpy(self.tokens[first : first + self.sequence_length + 1].astype(np.int64))
        item = {"input_ids": window[:-1], "labels": window[1:]}
        if self.document_attention:
            item["position_ids"] = self._positions(first)
        return item

    def _positions(self, first: int) -> Tensor:
        places = np.arange(first, first + self.sequence_length)
        document = np.searchsorted(self.starts, places, side="right") - 1
        return torch.from_numpy(places - np.maximum(self.starts[document], first))
