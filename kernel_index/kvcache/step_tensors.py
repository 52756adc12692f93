"""Lengths and page tables of a step, in memory of the device that every later step of as many rows uses again.

So a CUDA graph that was captured in one step reads, when it is replayed, what the latest ``begin`` has written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class StepTensors:
    """For up to ``rows`` rows: their lengths, and tables of up to ``columns`` pages (0: a cache without pages).

    >>> tensors = StepTensors(2, 4, torch.device("cpu"))
    >>> table = tensors.send_table([[3, 1], [0]])
    >>> table.tolist()
    [[3, 1], [0, -1]]
    >>> _ = tensors.send_table([[4, 1], [0, 2]])   # the same memory
    >>> table.tolist()
    [[4, 1], [0, 2]]
    """

    def __init__(self, rows: int, columns: int, device: torch.device):
        with torch.inference_mode(False):  # they outlive the mode of their construction
            self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            self._table = torch.full((rows, columns), -1, dtype=torch.int32, device=device)
        self._sent: list[list[int]] = [[] for _ in range(rows)]

    def send_lengths(self, lengths: Sequence[int]) -> Tensor:
        """The lengths as int32 [B] on the device; nothing waits for it."""
        with torch.inference_mode(False):
            numbers = torch.tensor(lengths, dtype=torch.int32, device="cpu")
            return self._lengths[: len(lengths)].copy_(numbers, non_blocking=True)

    def send_table(self, pages: Sequence[Sequence[int]]) -> Tensor:
        """The pages of every row as int32 [B, width], −1 after a row's last; only what has changed is sent."""
        where, what = list[int](), list[int]()
        for row, ids in enumerate(pages):
            sent, kept = self._sent[row], list(ids)
            same = len(sent) if kept[: len(sent)] == sent else 0
            entries = kept[same:] + [-1] * (len(sent) - len(kept))
            first = row * self._table.shape[1] + same
            where += range(first, first + len(entries))
            what += entries
            self._sent[row] = kept
        width = max((len(ids) for ids in pages), default=0)
        with torch.inference_mode(False):
            if where:
                at, value = (
                    torch.tensor(x, dtype=d, device="cpu") for x, d in ((where, torch.int64), (what, torch.int32))
                )
                device = self._table.device
                at, value = (x.to(device, non_blocking=True) for x in (at, value))
                self._table.view(-1).index_copy_(0, at, value)
            return self._table[: len(pages), :width]
