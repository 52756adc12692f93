"""``pack_tree``: lay out runs of tokens that share prefixes in one row; ``along_paths``: what runs path by path."""

from collections.abc import Callable, Sequence

from torch import Tensor

from kernel_index.core import checks
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree import paths
from kernel_index.masks.prefix_tree.contract import check_tree
from kernel_index.masks.prefix_tree.packing import TreePacking, packed


def pack_tree(parents: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor, *, align: int = 1) -> TreePacking:
    """Lay out a tree of token runs in one row, depth first, so that each shared run stands there once.

    A run continues another one: rollouts continue their prompt, prompts continue a system text.  The subtree of a token
    is then one stretch of the row, and a mask of one number for each key says who sees it::

        query t sees key s   iff   s ≤ t < subtree_end[s]

    Args:
        parents: for each run the earlier run that it continues, −1 for a root; several roots are several trees.
        lengths: for each run its tokens, at least 1.
        align: each run starts at an index that is congruent to its position modulo ``align``; the gaps are padding.
            1 leaves no gap.

    Returns:
        ``TreePacking(order, positions, subtree_end, parent_of, edges)``, int64 tensors on the CPU.  Give
        ``subtree_end`` and ``positions`` to ``MaskContract``, ``positions`` to ``fused_rope_qk``; the loss runs over
        ``edges``: the hidden state of ``source[e]`` predicts the token at ``target[e]``.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a run's parent does not come before it, a length is below 1, or the numbers of runs differ.

    Source: none; a row in depth-first order makes every subtree an interval.

    >>> import torch, kernel_index as ki
    >>> tree = ki.pack_tree([-1, 0, 0], [3, 2, 1])  # a prompt of three tokens, two answers
    >>> tree.positions.tolist(), tree.subtree_end.tolist()
    ([0, 1, 2, 3, 4, 3], [6, 6, 6, 5, 5, 6])
    >>> list(zip(*(x.tolist() for x in tree.edges)))
    [(0, 1), (1, 2), (2, 3), (3, 4), (2, 5)]
    """
    return packed(*check_tree(parents, lengths, align), align)


def along_paths(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    mask: MaskContract,
    by_query: tuple[Tensor, ...],
    by_key: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Run a function that takes no tree branch by branch, each over the keys of its path.

    A branch is a stretch of the row in which each token continues the one before it.  Its queries are the last tokens
    of its path, so ``run`` sees an ordinary call of fewer queries than keys, and each query is computed once.  Branches
    that begin at the same place of their paths are rows of one call: the answers to a prompt.  ``ki.moba_attention``
    and the other functions that select blocks go this way by themselves.

    Args:
        run: ``run(*by_query, *by_key, mask)`` of [G, n, …], [G, m, …] and the mask of those paths returns a tensor
            [G, n, …], or a tuple of such.
        mask: a contract with ``subtree_end``.
        by_query: tensors [B, T, …].
        by_key: tensors [B, T, …].

    Returns:
        A tuple of tensors [B, T, …], 0 for queries of a gap.

    Raises:
        ValueError: the mask is no tree, or no tensor is given.
        Ineligible: T ≠ S, a window over positions that do not grow by 1, or values that may not be read here.

    Source: none; see ``pack_tree``.

    >>> import torch, kernel_index as ki
    >>> tree = ki.pack_tree([-1, 0, 0], [3, 2, 1])
    >>> x = torch.arange(6.0)[None]
    >>> def sums_of_paths(q, k, mask):
    ...     return k.cumsum(1)[:, -q.shape[1]:]
    >>> ki.along_paths(sums_of_paths, ki.MaskContract(subtree_end=tree.subtree_end), (x,), (x,))[0]
    tensor([[ 0.,  1.,  3.,  6., 10.,  8.]])
    """
    if not isinstance(mask, MaskContract) or not mask.is_tree:
        raise ValueError("mask must be a MaskContract with subtree_end, got one without a tree")
    if not by_query or not by_key:
        raise ValueError("by_query and by_key must hold a tensor each, got none")
    for name, tensors in (("by_query", by_query), ("by_key", by_key)):
        for x in tensors:
            checks.is_tensor(name, x)
    queries, keys = by_query[0], by_key[0]
    sizes = mask.sizes(queries.shape[0], queries.shape[1], keys.shape[1], queries.device)
    return paths.along_paths("along_paths", run, mask, sizes, by_query, by_key)
