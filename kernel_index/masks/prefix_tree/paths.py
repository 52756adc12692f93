"""A tree as paths: what routes over blocks runs branch by branch, each over the keys of its path.

A branch is a stretch of the row in which each token continues the one before it.  Its queries are the last tokens of
its path, so an ordinary call with fewer queries than keys serves them, and every query is computed once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.dispatch import Ineligible
from kernel_index.core.rows import taken
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
    """The branches of every row of a tree's tensors; reads values.

    That waits for a device, once for each contract, unless the contract was made on the host and moved with ``to``.
    """

    def build() -> tuple[tuple[Branch, ...], ...]:
        known = mask.on_the_host() or mask
        if known.subtree_end is None:
            everything = torch.arange(sizes.keys)
            return ((Branch(everything, everything),),)
        ends = torch.atleast_2d(known.subtree_end.detach().to("cpu", torch.int64))
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
    known = mask.on_the_host() or mask
    assert known.positions is not None
    along = torch.atleast_2d(known.positions.detach().cpu())
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
    """``run(*by_query, *by_key, mask of the paths)`` for the branches, put back in the rows' order.

    Branches that begin at the same place of their paths, in whatever rows, are rows of one call: a prompt's answers.

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
    if not sizes.batch:
        return _as_tuple(run(*by_query, *by_key, MaskContract()))
    groups, place = mask.remember("groups of branches", sizes, lambda: _grouped(mask, sizes))
    found = [
        _as_tuple(run(*(_taken(x, g.queries) for x in by_query), *(_taken(x, g.keys) for x in by_key), g.mask))
        for g in groups
    ]
    fillers = in_gaps + (0.0,) * (len(time_dims) - len(in_gaps))
    return tuple(map(functools.partial(_in_order, place), zip(*found, strict=True), time_dims, fillers))


class Group(NamedTuple):
    """Branches that begin at one place of their paths: ``queries`` [G, n] and ``keys`` [G, m] among the B·T tokens.

    Shorter ones repeat their last token.  It comes after their own, so nobody sees it; by the ``mask`` it sees nothing,
    and kernels pass over it.
    """

    queries: Tensor
    keys: Tensor
    mask: MaskContract


MOST_PADDED = 2
"""A branch joins others that are at most so many times as long."""


def _grouped(mask: MaskContract, sizes: Sizes) -> tuple[tuple[Group, ...], Tensor]:
    """The groups, and for each token [B, T] its place among the queries of all of them; a gap is after the last."""
    branches = branches_of(mask, sizes)
    members = [(b, branch) for b in range(sizes.batch) for branch in branches[b % len(branches)]]
    if any(len(branch.queries) for _, branch in members):
        members = [member for member in members if len(member[1].queries)]  # without the rows of gaps
    of_keys = mask.key_validity is not None and mask.key_validity.tokens is not None
    groups, last = list[Group](), 0
    place = torch.full((sizes.batch * sizes.queries,), -1)
    for of_group in _alike(members, 1 if of_keys else MOST_PADDED):
        group = _group(mask, sizes, of_group)
        width = group.queries.shape[1]
        for b, branch in of_group:
            at = last + torch.arange(len(branch.queries))
            place[b * sizes.queries + branch.queries] = at
            last += width
        groups.append(group)
    place = torch.where(place < 0, last, place).view(sizes.batch, sizes.queries)
    return tuple(groups), place.to(sizes.device)


def _alike(members: list[tuple[int, Branch]], most: int) -> list[list[tuple[int, Branch]]]:
    """Branches that begin at the same place of their paths, the longest first, at most ``most`` times as long."""
    found = list[list[tuple[int, Branch]]]()

    def order(member: tuple[int, Branch]) -> tuple[int, int]:
        queries, keys = map(len, member[1])
        return keys - queries, -queries

    for member in sorted(members, key=order):
        begin, length = order(member)
        first = order(found[-1][0]) if found else (-1, 0)
        if begin == first[0] and -length * most >= -first[1]:
            found[-1].append(member)
        else:
            found.append([member])
    return found


def _group(mask: MaskContract, sizes: Sizes, members: list[tuple[int, Branch]]) -> Group:
    rows = torch.tensor([b for b, _ in members])[:, None]
    queries, keys = (_padded(x) for x in zip(*(branch for _, branch in members), strict=True))
    lengths = torch.tensor([len(branch.keys) for _, branch in members])[:, None]
    is_token = None if bool((lengths == keys.shape[1]).all()) else torch.arange(keys.shape[1]) < lengths
    device, at_queries, at_keys = sizes.device, rows * sizes.queries + queries, rows * sizes.keys + keys
    real = None if is_token is None else is_token.to(device)
    of_paths = _mask_of_paths(mask, sizes, rows.to(device), queries.to(device), keys.to(device), real)
    return Group(at_queries.to(device), at_keys.to(device), of_paths)


def _padded(parts: tuple[Tensor, ...]) -> Tensor:
    """Rows of one length [G, n]; the last of each is repeated."""
    longest = max(map(len, parts))
    return torch.stack([x[torch.arange(longest).clamp(max=max(len(x) - 1, 0))] if len(x) else x for x in parts])


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """The tokens ``at`` [G, n] of x [B, T, …]; answers share the keys of their prompt."""
    return taken(x.flatten(0, 1), at.flatten()).unflatten(0, at.shape)


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _in_order(place: Tensor, pieces: tuple[Tensor, ...], dim: int, filler: float) -> Tensor:
    """One result of every group, [B, …] in the rows' order."""
    flat = [piece.movedim(dim, 1).flatten(0, 1) for piece in pieces]
    last = flat[0].new_full((1, *flat[0].shape[1:]), filler)
    found = torch.cat([*flat, last]).index_select(0, place.flatten()).unflatten(0, place.shape)
    return found.movedim(1, dim).contiguous()


def _mask_of_paths(
    mask: MaskContract, sizes: Sizes, rows: Tensor, queries: Tensor, keys: Tensor, is_token: Tensor | None
) -> MaskContract:
    """Causality, the window, the documents and the valid tokens of paths, which are their first ones.

    The first token of a document is its id here.  Two documents may have one id, and a path may leave out all tokens
    between them.  ``rows`` [G, 1], ``queries`` [G, n] and ``keys`` [G, m] are indices; ``is_token`` [G, m] is False for
    what is repeated, None where nothing is.
    """
    of_rows = mask.document_rows(sizes.keys)
    ids = None
    if of_rows is not None:
        first = torch.where(of_rows < 0, -1, segments(of_rows)[0])
        ids = first[rows % len(first), keys]
    counts = [None if v is None or v.tokens is None else v.tokens[rows] for v in (mask.validity, mask.key_validity)]
    own = of_keys = None
    if counts[1] is not None:
        of_keys = attention_validity(valid_token_counts=(keys < counts[1]).sum(1))
        own = None if counts[0] is None else attention_validity(valid_token_counts=(queries < counts[0]).sum(1))
    elif counts[0] is not None:
        ids = torch.where(keys < counts[0], 0 if ids is None else ids, -1)
    if is_token is not None:
        ids = torch.where(is_token, 0 if ids is None else ids, -1)
    return MaskContract(window=mask.window, doc_ids=ids, validity=own, key_validity=of_keys)
