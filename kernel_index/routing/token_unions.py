"""The unions of the tokens that 64 neighbouring queries selected: what kernels read instead of single selections.

Sizes are bounds that the host knows, so nothing waits for a device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64
"""Queries of a tile: one bit of a word for each."""

BLOCK = 128
"""Lists begin at multiples of it."""

GRAIN = 32
"""Tokens whose entries of a list are found by one number and 32 bits."""

TABLE_BYTES = 1 << 27
"""Of the table of a chunk of queries."""


class Rounds(NamedTuple):
    """Lists taken some at a time: in round i those that begin among the ``part`` entries from ``i · part`` on.

    ``owners`` int32: the list that holds each run of ``BLOCK`` entries, −1 behind the last one.  ``lists`` int32: how
    many lists begin before each round.  ``numbers`` int64 [rounds, 2]: i for kernels, which a number of the host would
    make compile again.

    A kernel keeps the entries of a round as rows, those of a token together in the order of their lists: ``slots``
    int32 is the row of each entry, and ``starts`` int32 [rounds, lists / tiles, tokens + 1] the first row of each
    token of a selection, up to that of the next one.  Neither says anything of what a round lacks.
    """

    part: int
    owners: Tensor
    lists: Tensor
    numbers: Tensor
    slots: Tensor
    starts: Tensor


class TokenUnions(NamedTuple):
    """The lists of a chunk: ``queries`` queries from ``first`` on, ``lists`` = B · P selections, ``tiles`` each.

    List i of selection l is number ``l · tiles + i``.  It has ``sizes`` entries from ``begin`` on, int32 and int64
    [lists · tiles]; entry e is ``tokens[e]``, ascending, and the bits of ``words[e]`` are the queries that selected it.
    Nothing is written between its end and the next multiple of ``BLOCK``.  ``before`` int32 [lists · tiles, runs + 1]:
    entries with a token before each run of ``GRAIN`` tokens; ``present`` int32 [lists · tiles, runs]: a bit for each
    token of a run that has an entry.  ``most``: entries of a list at most.
    """

    first: int
    queries: int
    tiles: int
    most: int
    tokens: Tensor
    words: Tensor
    begin: Tensor
    sizes: Tensor
    before: Tensor
    present: Tensor


def chunks_of_queries(batch: int, shared: int, queries: int, keys: int) -> Iterator[tuple[int, int]]:
    """``(first, queries)`` of the chunks, whole tiles but for the last."""
    width = -(-max(1, keys) // BLOCK) * BLOCK
    tiles = max(1, TABLE_BYTES // (8 * width * max(1, batch * shared)))
    for first in range(0, queries, tiles * TILE):
        yield first, min(tiles * TILE, queries - first)


def unions_of(indices: Tensor, keys: int, first: int, queries: int) -> TokenUnions:
    """From integers [B, T, P, n] in any order, dense in n, with repeats; what is outside of [0, keys) is no token."""
    from kernel_index.routing import triton_token_unions

    batch, _, shared, count = indices.shape
    blocks, tiles = -(-max(1, keys) // BLOCK), -(-queries // TILE)
    lists, device = batch * shared * tiles, indices.device
    table = torch.zeros(lists, blocks * BLOCK, dtype=torch.int64, device=device)
    if count and keys:
        triton_token_unions.mark(table, indices, first, queries, keys)
    runs = blocks * BLOCK // GRAIN
    present = torch.empty(lists, runs, dtype=torch.int32, device=device)
    before = torch.empty(lists, runs + 1, dtype=torch.int32, device=device)
    sizes = torch.empty(lists, dtype=torch.int32, device=device)
    triton_token_unions.count(table, present, before, sizes, GRAIN)
    padded = (sizes + (BLOCK - 1)) // BLOCK * BLOCK
    begin = padded.cumsum(0, dtype=torch.int64) - padded
    most = max(1, min(blocks, -(-TILE * count // BLOCK))) * BLOCK
    tokens = torch.empty(lists * most, dtype=torch.int32, device=device)
    words = torch.empty(lists * most, dtype=torch.int64, device=device)
    triton_token_unions.write_lists(table, begin, before, present, (tokens, words))
    return TokenUnions(first, queries, tiles, most, tokens, words, begin, sizes, before, present)
