"""``pack_tree``: lay out runs of tokens that share prefixes in one row."""

from collections.abc import Sequence

from torch import Tensor

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
