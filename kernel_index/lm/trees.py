"""Batches of prefix trees: rows that hold each shared run of tokens once, and the loss over their edges."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.transfers import to_device
from kernel_index.lm.data import START


class TokenTree(NamedTuple):
    """A tree of token runs: ``parents[i] < i`` is the run that run i continues, −1 for a root."""

    parents: Sequence[int]
    runs: Sequence[Tensor]


class TreeBatch(NamedTuple):
    """Rows of prefix trees, each tensor int64.

    ``tokens`` ``positions``: [B, T]; a gap has token START, and no token sees it.  ``mask``: which keys each token may
    attend to, those of its path.  ``sources`` ``targets``: [E], for each edge the place of its source in the B·T
    tokens, and the token that it predicts.  ``after_next``: [A, 2], pairs of edges of which the second continues the
    first.

    >>> import torch
    >>> tree = TokenTree([-1, 0, 0], [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8])])
    >>> batch = TreeBatch.of([tree])
    >>> batch.tokens.tolist(), batch.sources.tolist(), batch.targets.tolist()
    ([[5, 6, 7, 8]], [0, 1, 1], [6, 7, 8])
    """

    tokens: Tensor
    positions: Tensor
    mask: "ki.MaskContract"
    sources: Tensor
    targets: Tensor
    after_next: Tensor

    @classmethod
    def of(cls, trees: Sequence[TokenTree], *, length: int | None = None, align: int = 1) -> "TreeBatch":
        """One tree in each row; rows are as long as the longest, or ``length``.

        Raises ``ValueError`` for a tree that does not fit.
        """
        if length is not None:
            checks.is_int("length", length, minimum=0)
        trees = [TokenTree(t.parents, [torch.as_tensor(run, dtype=torch.int64) for run in t.runs]) for t in trees]
        packings = [ki.pack_tree(t.parents, [len(run) for run in t.runs], align=align) for t in trees]
        longest = max((len(p.positions) for p in packings), default=0)
        if length is not None and longest > length:
            raise ValueError(f"length must be at least {longest}, the longest tree, got {length}")
        T = longest if length is None else length
        tokens, positions = torch.full((len(trees), T), START), torch.zeros(len(trees), T, dtype=torch.int64)
        ends, edges, pairs = torch.arange(T).repeat(len(trees), 1), list[Tensor](), list[Tensor]()
        for row, (tree, packing) in enumerate(zip(trees, packings, strict=True)):
            used = slice(len(packing.positions))
            in_order = [tree.runs[i] for i in packing.order.tolist()]
            tokens[row, used][packing.is_token] = torch.cat([tokens.new_empty(0), *in_order])
            positions[row, used], ends[row, used] = packing.positions, packing.subtree_end
            source, target = packing.edges
            of_target = torch.full((T,), -1)
            of_target[target] = torch.arange(len(target)) + sum(map(len, edges))
            first = of_target[source]
            pairs.append(torch.stack([first, of_target[target]], 1)[first >= 0])
            edges.append(torch.stack([row * T + source, tokens[row, target]], 1))
        sources, targets = (torch.cat(edges) if edges else torch.zeros(0, 2, dtype=torch.int64)).T
        after_next = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.int64)
        mask = ki.MaskContract(subtree_end=ends, positions=positions)
        return cls(tokens, positions, mask, sources.contiguous(), targets.contiguous(), after_next)

    def to(self, device: torch.device | str) -> "TreeBatch":
        """The batch on another device; its mask keeps what the host knows of the trees, so that layers without a
        window wait for nothing."""
        tokens, positions, *others = (to_device(x, torch.device(device)) for x in self if isinstance(x, Tensor))
        return TreeBatch(tokens, positions, self.mask.to(device), *others)


def at_sources(hidden_BTC: Tensor, sources: Tensor) -> Tensor:
    """The hidden state of each edge's source [E, C]; the gradient of a shared one is added up in float32, in order."""
    flat = hidden_BTC.flatten(0, 1)
    return ki.gather_rows(flat[:, None].contiguous(), sources)[:, 0]
