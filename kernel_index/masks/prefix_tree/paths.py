"""A tree as paths: what routes over blocks runs once for each branch, over the keys of its path.

A branch is a stretch of the row in which each token continues the one before it.  Its queries are the last tokens of
its path, so an ordinary call with fewer queries than keys serves them, and every query is computed once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.dispatch import Ineligible
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.intervals import Sizes, segments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.bounds import parents_of

NEEDS_VALUES = "the branches of a prefix tree are read on the host, which a trace, a transform or a mode forbids"
NEEDS_SQUARE = "a prefix tree is routed only where T = S and query 0 is at key 0"
NEEDS_STEPS = "a window in a routed prefix tree needs positions that grow by 1 along each path"


class Branch(NamedTuple):
    """int64 indices of the row: ``queries`` [n], and the path that ends with them, ``keys`` [m]."""

    queries: Tensor
    keys: Tensor


def branches_of(mask: MaskContract, sizes: Sizes) -> tuple[tuple[Branch, ...], ...]:
    """The branches of every row of a tree's tensors; reads values, which waits for a device once for each contract."""

    def build() -> tuple[tuple[Branch, ...], ...]:
        if mask.subtree_end is None:
            everything = torch.arange(sizes.keys)
            return ((Branch(everything, everything),),)
        ends = torch.atleast_2d(mask.subtree_end.detach().to("cpu", torch.int64))
        return tuple(_branches(end, parent) for end, parent in zip(ends, parents_of(ends, True), strict=True))

    return mask.remember("branches", sizes, build)


def _branches(subtree_end: Tensor, parent: Tensor) -> tuple[Branch, ...]:
    index = torch.arange(subtree_end.shape[0])
    tokens = subtree_end > index
    starts = (tokens & ((parent != index - 1) | (index == 0))).nonzero().flatten().tolist()
    found = list[Branch]()
    paths = list[tuple[int, Tensor]]()  # the open branches, outermost first: where each begins, and its path
    for start, limit in zip(starts, [*starts, len(index)][1:], strict=True):
        queries = index[start:limit][tokens[start:limit]]
        above, before = int(parent[start]), index[:0]
        while paths and paths[-1][0] > above:
            paths.pop()
        if above >= 0:
            path = paths[-1][1]
            before = path[: int(torch.searchsorted(path, above, right=True))]
        paths.append((start, torch.cat([before, queries])))
        found.append(Branch(queries, paths[-1][1]))
    if not found:  # a row of gaps: one branch without a token
        found.append(Branch(index[:0], index[:0]))
    return tuple(found)


def check_branches(op: str, mask: MaskContract, sizes: Sizes) -> None:
    """Raise ``Ineligible`` where the branches of a tree cannot be taken one by one."""
    reason = _why_not(mask, sizes)
    if reason is not None:
        raise Ineligible(f"{op}: no backend can run this call ({reason})")


def _why_not(mask: MaskContract, sizes: Sizes) -> str | None:
    if torch.compiler.is_compiling() or rules.inside_functorch() or rules.inside_dispatch_mode():
        return NEEDS_VALUES
    if sizes.device.type == "meta":
        return "a tensor on the meta device has no values: the branches of a prefix tree are read"
    if sizes.queries != sizes.keys or sizes.offset != 0:
        return NEEDS_SQUARE
    if mask.window[0] is not None and mask.positions is not None and not _steps(mask, sizes):
        return NEEDS_STEPS
    return None


def _steps(mask: MaskContract, sizes: Sizes) -> bool:
    assert mask.positions is not None
    along = torch.atleast_2d(mask.positions.detach().cpu())
    rows = branches_of(mask, sizes)
    return all(
        bool((row[branch.keys].diff() == 1).all())
        for i in range(max(len(along), len(rows)))
        for row in [along[i % len(along)]]
        for branch in rows[i % len(rows)]
    )


def along_paths(
    op: str,
    run: Callable[..., Any],
    mask: MaskContract,
    sizes: Sizes,
    by_query: tuple[Tensor, ...],
    by_key: tuple[Tensor, ...],
    time_dims: tuple[int, ...] = (1,),
    in_gaps: tuple[float, ...] = (0.0,),
) -> tuple[Tensor, ...]:
    """``run(*by_query, *by_key, branch's mask)`` for each branch of each row, put back in the row's order.

    Args:
        op: the name of the function.
        run: returns a tensor, or a tuple of them.
        mask: a tree.
        sizes: the mask's.
        by_query: tensors [B, T, …].
        by_key: tensors [B, S, …].
        time_dims: of each result, the dimension of the queries.
        in_gaps: of each result, what a gap has; zeros after the last one.

    Returns:
        The results with T queries.

    Raises:
        Ineligible: T ≠ S, a window over positions that do not grow by 1, or values that may not be read here.
    """
    check_branches(op, mask, sizes)
    branches, rows = branches_of(mask, sizes), list[list[Tensor]]()
    for b in range(sizes.batch):
        pieces, queries = list[tuple[Tensor, ...]](), list[Tensor]()
        for branch in branches[b % len(branches)]:
            q, keys = (x.to(sizes.device) for x in branch)
            of_branch = (x[b : b + 1].index_select(1, q) for x in by_query)
            of_path = (x[b : b + 1].index_select(1, keys) for x in by_key)
            pieces.append(_as_tuple(run(*of_branch, *of_path, _mask_of_path(mask, sizes, b, q, keys))))
            queries.append(q)
        rows.append(_in_order(pieces, queries, sizes.queries, time_dims, in_gaps))
    if not rows:
        return _as_tuple(run(*by_query, *by_key, MaskContract()))
    return tuple(torch.cat(of_rows) for of_rows in zip(*rows, strict=True))


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _in_order(
    pieces: list[tuple[Tensor, ...]],
    queries: list[Tensor],
    tokens: int,
    dims: tuple[int, ...],
    in_gaps: tuple[float, ...],
) -> list[Tensor]:
    """Each result of a row, in the row's order.  A gap takes the filler, which stands after the last query."""
    at = torch.cat(queries)
    place = at.new_full((tokens,), at.shape[0])
    place[at] = torch.arange(at.shape[0], device=at.device)
    found = list[Tensor]()
    fillers = in_gaps + (0.0,) * (len(dims) - len(in_gaps))
    for of_result, dim, filler in zip(zip(*pieces, strict=True), dims, fillers, strict=True):
        joined = torch.cat(of_result, dim)
        shape = [1 if i == dim else n for i, n in enumerate(joined.shape)]
        found.append(torch.cat([joined, joined.new_full(shape, filler)], dim).index_select(dim, place))
    return found


def _mask_of_path(mask: MaskContract, sizes: Sizes, b: int, queries: Tensor, keys: Tensor) -> MaskContract:
    """Causality, the window, the documents and the valid tokens of a path, which are its first ones.

    The first token of a document is its id here.  Two documents may have one id, and a path may leave out all tokens
    between them.
    """
    rows = mask.document_rows(sizes.keys)
    ids = None
    if rows is not None:
        row = rows[b % len(rows)][None]
        ids = torch.where(row < 0, -1, segments(row)[0])[0, keys]
    counts = [None if v is None or v.tokens is None else v.tokens[b] for v in (mask.validity, mask.key_validity)]
    own = of_keys = None
    if counts[1] is not None:
        of_keys = attention_validity(valid_token_counts=(keys < counts[1]).sum()[None])
        own = None if counts[0] is None else attention_validity(valid_token_counts=(queries < counts[0]).sum()[None])
    elif counts[0] is not None:
        ids = torch.where(keys < counts[0], 0 if ids is None else ids, -1)
    return MaskContract(
        window=mask.window, doc_ids=None if ids is None else ids[None], validity=own, key_validity=of_keys
    )
