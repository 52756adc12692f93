"""A tree as paths: what routes over blocks runs branch by branch, each over the keys of its path.

A branch is a stretch of the row in which each token continues the one before it.  Its queries are the last tokens of
its path, so an ordinary call with fewer queries than keys serves them, and every query is computed once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernel_index.core import rules
from kernel_index.core.dispatch import Ineligible
from kernel_index.core.rows import taken
from kernel_index.core.transfers import to_device, values_of
from kernel_index.masks.attention_validity_prefix.api import attention_validity
from kernel_index.masks.doc_window_mask.intervals import Sizes, segments
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.runs import Stretch, along

NEEDS_VALUES = "the branches of a prefix tree are read on the host, which a trace, a transform or a mode forbids"
NEEDS_SQUARE = "a prefix tree is routed only where T = S and query 0 is at key 0"
NEEDS_STEPS = "a window in a routed prefix tree needs positions that grow by 1 along each path"


class Branch(NamedTuple):
    """``path``: stretches of tokens of a row, from its root; the last one holds the queries, all of them the keys."""

    path: tuple[range, ...]

    @property
    def queries(self) -> range:
        return self.path[-1]

    @property
    def length(self) -> int:
        """Keys of the path."""
        return sum(map(len, self.path))

    @property
    def keys(self) -> Tensor:
        """The tokens of the path, int64 [length], on the host."""
        return torch.cat([torch.arange(part.start, part.stop) for part in self.path])


def branches_of(mask: MaskContract, sizes: Sizes) -> tuple[tuple[Branch, ...], ...]:
    """The branches of every row of a tree's tensors; reads values.

    That waits for a device, once for each contract, unless the contract was made on the host and moved with ``to``.
    """

    return mask.remember("branches", sizes, lambda: tuple(map(_branches, mask.stretches(sizes))))


def _branches(stretches: list[Stretch]) -> tuple[Branch, ...]:
    found = list[Branch]()
    for stretch in stretches:
        before: tuple[range, ...] = ()
        if stretch.parent >= 0:
            *before, last = found[stretch.parent].path
            before = (*before, range(last.start, stretch.above + 1))
        found.append(Branch((*before, stretch.tokens)))
    return tuple(found or [Branch((range(0),))])  # a row of gaps: one branch without a token


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
    """Whether positions grow by 1 along each path."""

    def build() -> tuple[bool]:
        known = mask.on_the_host() or mask
        assert known.positions is not None
        along, rows = np.atleast_2d(values_of(known.positions)), mask.stretches(sizes)
        pairs = ((along[i % len(along)], rows[i % len(rows)]) for i in range(max(len(along), len(rows))))
        return (all(_step(row, stretch) for row, stretches in pairs for stretch in stretches),)

    return mask.remember("steps", sizes, build)[0]


def _step(positions: np.ndarray, stretch: Stretch) -> bool:
    own = positions[stretch.tokens.start : stretch.tokens.stop]
    return bool((np.diff(own) == 1).all()) and (stretch.above < 0 or own[0] - positions[stretch.above] == 1)


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
        time_dims: of each result, the dimension of the queries; 1 after the last one.
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
    results = list(zip(*found, strict=True))
    dims = time_dims + (1,) * (len(results) - len(time_dims))
    fillers = in_gaps + (0.0,) * (len(results) - len(in_gaps))
    return tuple(map(functools.partial(_in_order, place), results, dims, fillers))


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
    members = [member for member in members if member[1].queries] or members  # without the rows of gaps
    of_keys = mask.key_validity is not None and mask.key_validity.tokens is not None
    groups, last = list[Group](), 0
    place = torch.full((sizes.batch, sizes.queries), -1)
    for of_group in _alike(members, 1 if of_keys else MOST_PADDED):
        group = _group(mask, sizes, of_group)
        width = group.queries.shape[1]
        for b, branch in of_group:
            place[b, branch.queries.start : branch.queries.stop] = torch.arange(last, last + len(branch.queries))
            last += width
        groups.append(group)
    return tuple(groups), to_device(torch.where(place < 0, last, place), sizes.device)


def _alike(members: list[tuple[int, Branch]], most: int) -> list[list[tuple[int, Branch]]]:
    """Branches that begin at the same place of their paths, the longest first, at most ``most`` times as long."""
    found = list[list[tuple[int, Branch]]]()

    def order(member: tuple[int, Branch]) -> tuple[int, int]:
        queries = len(member[1].queries)
        return member[1].length - queries, -queries

    for member in sorted(members, key=order):
        begin, length = order(member)
        first = order(found[-1][0]) if found else (-1, 0)
        if begin == first[0] and -length * most >= -first[1]:
            found[-1].append(member)
        else:
            found.append([member])
    return found


def _group(mask: MaskContract, sizes: Sizes, members: list[tuple[int, Branch]]) -> Group:
    lengths, device = [branch.length for _, branch in members], sizes.device
    longest = max(lengths)
    rows, length = to_device(torch.tensor([[b for b, _ in members], lengths]), device)[..., None]
    queries = along([(branch.queries,) for _, branch in members], max(len(b.queries) for _, b in members), device)
    keys = along([branch.path for _, branch in members], longest, device)
    is_token = None if min(lengths) == longest else torch.arange(longest, device=device) < length
    of_paths = _mask_of_paths(mask, sizes, rows, queries, keys, is_token)
    return Group(rows * sizes.queries + queries, rows * sizes.keys + keys, of_paths)


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
