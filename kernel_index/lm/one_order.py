"""One order of a batch's documents, whatever rows they come in: ``numerics("invariant")`` trains in it.

The gradient of a weight is a sum over all tokens.  In this order that sum, and so each of its bits, depends on the
documents alone: not on how a caller packs them, nor on the order of the rows.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, Self

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core.by_content import hashed, inverse, packed_by_content, scattered
from kernel_index.lm.data import IGNORED, START, Batch
from kernel_index.lm.trees import TreeBatch
from kernel_index.nn.device_scan import length_of_chunks


class Ordered(Batch):
    """A batch whose documents are in their one order already.

    ``in_chunks`` is the length of its rows where each document has whole chunks: what a scan would read on the device.
    """

    in_chunks: int = 0

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        found = super().each(function)
        found.in_chunks = self.in_chunks
        return found

    @property
    def kind(self) -> Hashable:
        return super().kind, self.in_chunks


AnyBatch = Batch | TreeBatch
Back = Callable[[Tensor], Tensor]


class InOrder(NamedTuple):
    """The documents of a batch in their one order.

    ``of_tokens`` and ``of_targets`` bring values of its tokens and targets to the places that the caller knows, with 0
    for padding.
    """

    batch: AnyBatch
    of_tokens: Back
    of_targets: Back


def as_given(batch: AnyBatch) -> InOrder:
    return InOrder(batch, _same, _same)


def _same(values: Tensor) -> Tensor:
    return values


def in_one_order(batch: AnyBatch) -> InOrder:
    """All documents of a batch in rows that they alone decide; trees keep their rows, in another order.

    A hash of 64 bits of their tokens, positions and targets tells documents apart.  Those that are alike in all of
    these keep the caller's order: their gradients are alike too, unless the caller weighs them differently.

    >>> import torch
    >>> a, b, c = (torch.tensor(x) for x in ([5, 6], [7], [8, 9, 1]))
    >>> one, other = Batch.of_documents([[a, b], [c]]), Batch.of_documents([[c], [b], [a]])
    >>> torch.equal(in_one_order(one).batch.tokens, in_one_order(other).batch.tokens)
    True
    """
    return _trees(batch) if isinstance(batch, TreeBatch) else _documents(batch)


def _documents(batch: Batch) -> InOrder:
    shape = batch.tokens.shape
    columns = torch.arange(shape[1], device=batch.tokens.device)
    real = (batch.doc_ids >= 0) & (columns < batch.valid_counts[:, None])
    places = real.flatten().nonzero()[:, 0]  # of each token in the caller's rows
    if not len(places):
        return as_given(batch)
    ids = batch.doc_ids.flatten()[places].unique(return_inverse=True)[1]  # below the number of tokens
    words = (x.flatten()[places] for x in (batch.tokens, batch.positions, batch.targets))
    packing = packed_by_content(places // shape[1] * len(places) + ids, places, *words)
    numbers = scattered(packing.number + 1, packing.slots, packing.shape) - 1
    tokens, targets, positions = (
        packing.rows(x, padding)
        for x, padding in ((batch.tokens, START), (batch.targets, IGNORED), (batch.positions, 0))
    )
    counts = (numbers >= 0).sum(1)

    def back(values: Tensor) -> Tensor:
        return scattered(packing.taken(values), packing.places, shape)

    ordered = Ordered(tokens, targets, positions, numbers, counts)
    ordered.in_chunks = length_of_chunks(packing.lengths, packing.shape[1])
    return InOrder(ordered, back, back)


def _trees(batch: TreeBatch) -> InOrder:
    given, ends = batch.tokens.shape, batch.mask.subtree_end
    assert ends is not None
    columns = torch.arange(given[1], device=ends.device)
    real = ends > columns  # a gap is no subtree
    used = real.any(0).nonzero()[:, 0]
    if not len(used):
        return as_given(batch)
    length = int(used[-1]) + 1  # without the padding behind the longest tree
    hashes = hashed(columns.expand_as(ends), batch.tokens, batch.positions, ends)
    order = torch.where(real, hashes, 0).sum(1).argsort(stable=True)
    rank = inverse(order)
    row, column = batch.sources // given[1], batch.sources % given[1]
    by_row = rank[row].argsort(stable=True)  # the edges of a row follow each other
    rank_of_edge = inverse(by_row)
    pairs = rank_of_edge[batch.after_next]
    tokens, positions, ends = (x[order, :length] for x in (batch.tokens, batch.positions, ends))
    sorted_batch = TreeBatch(
        tokens=tokens,
        positions=positions,
        mask=ki.MaskContract(subtree_end=ends, positions=positions),
        sources=(rank[row] * length + column)[by_row],
        targets=batch.targets[by_row],
        after_next=pairs[pairs[:, 0].argsort(stable=True)],
    )

    def back(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.index_select(0, rank), (0, 0, 0, given[1] - length))

    return InOrder(sorted_batch, back, lambda values: values.index_select(0, rank_of_edge))
