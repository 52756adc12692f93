"""The unions of tiles, interpreted: what Python's own sets say, in rounds and chunks of any size."""

import pytest
import torch

from kernel_index.core.triton import launch
from kernel_index.routing import token_unions, triton_token_unions, triton_union_sums
from kernel_index.routing.token_unions import BLOCK, GRAIN, TILE, chunks_of_queries, unions_of

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

B, T, P, N, S = 2, 150, 2, 7, 300


def selection(seed=0):
    """With repeats, and with entries that are no token."""
    return torch.randint(-2, S + 3, (B, T, P, N), generator=torch.Generator().manual_seed(seed))


def by_sets(indices, b, p, first, queries):
    """Token -> bits of the queries of each tile."""
    tiles = []
    for at in range(first, first + queries, TILE):
        words = {}
        for t in range(at, min(at + TILE, first + queries)):
            for s in indices[b, t, p].tolist():
                if 0 <= s < S:
                    words[s] = words.get(s, 0) | 1 << (t - at)
        tiles.append(dict(sorted(words.items())))
    return tiles


@pytest.mark.parametrize("marked", [triton_token_unions.MARKED, (4, 4)], ids=["all places", "some places"])
@pytest.mark.parametrize(("first", "queries"), [(0, T), (64, 86), (128, 22)])
def test_lists_are_those_of_sets(first, queries, marked, monkeypatch):
    monkeypatch.setattr(triton_token_unions, "MARKED", marked)
    indices = selection()
    u = unions_of(indices, S, first, queries)
    assert u.most % BLOCK == 0
    for i in range(B * P):
        for j, expected in enumerate(by_sets(indices, i // P, i % P, first, queries)):
            at = i * u.tiles + j
            begin, size = int(u.begin[at]), int(u.sizes[at])
            words = [w % 2**64 for w in u.words[begin : begin + size].tolist()]
            assert dict(zip(u.tokens[begin : begin + size].tolist(), words, strict=True)) == expected
            assert list(expected) == u.tokens[begin : begin + size].tolist()
            tokens = torch.tensor(list(expected))
            assert u.before[at].tolist() == [int((tokens < n * GRAIN).sum()) for n in range(u.before.shape[1])]
            for run, present in enumerate(u.present[at].tolist()):
                here = tokens[(tokens >= run * GRAIN) & (tokens < run * GRAIN + GRAIN)] % GRAIN
                assert present % 2**32 == sum(1 << n for n in here.tolist())


@pytest.mark.parametrize("size", [1, 5 * BLOCK, 1 << 40])
def test_every_list_is_in_one_round(size, monkeypatch):
    monkeypatch.setattr(triton_union_sums, "ROUND_BYTES", size)
    indices = selection()
    indices[:, TILE : 2 * TILE] = -1  # empty lists in between
    u = unions_of(indices, S, 0, T)
    rounds = triton_union_sums.rounds_of(u, 1)
    owned = torch.full((len(u.begin),), -1)
    for i, number in enumerate(rounds.numbers[:, 0].tolist()):
        assert number == i
        low, high = rounds.lists[i : i + 2].tolist()
        assert (owned[low:high] == -1).all()
        owned[low:high] = i
        assert (u.begin[low:high] // rounds.part == i).all()
        assert (u.begin[low:high] + u.sizes[low:high] <= i * rounds.part + rounds.part + u.most).all()
    assert (owned[u.sizes > 0] >= 0).all()
    for at, owner in zip(range(0, len(u.tokens), BLOCK), rounds.owners.tolist(), strict=True):
        inside = ((u.begin <= at) & (at < u.begin + u.sizes)).nonzero().flatten().tolist()
        assert inside == ([owner] if owner >= 0 else [])


@pytest.mark.parametrize("size", [1, 5 * BLOCK, 1 << 40])
@pytest.mark.parametrize("first", [0, 64])
def test_rows_of_a_token_lie_together_in_the_order_of_their_lists(first, size, monkeypatch):
    monkeypatch.setattr(triton_union_sums, "ROUND_BYTES", size)
    indices = selection()
    indices[0, :, 0] = -1  # a selection without a token, and some that a round has in part
    u = unions_of(indices, S, first, T - first)
    rounds = triton_union_sums.rounds_of(u, 1)
    for number, places in enumerate(rounds.starts):
        low, high = rounds.lists[number : number + 2].tolist()
        taken = torch.zeros(rounds.part + u.most, dtype=torch.bool)
        for selected in range(low // u.tiles, (high - 1) // u.tiles + 1 if low < high else 0):
            lists = range(max(low, selected * u.tiles), min(high, (selected + 1) * u.tiles))
            rows: dict[int, list[int]] = {}
            for i in lists:
                begin = int(u.begin[i])
                for e in range(begin, begin + int(u.sizes[i])):
                    rows.setdefault(int(u.tokens[e]), []).append(int(rounds.slots[e]))
            for token in range(S):
                here = rows.get(token, [])
                assert here == list(range(*places[selected, token : token + 2].tolist()))
                assert not taken[here].any()
                taken[here] = True


@pytest.mark.parametrize(("values", "unroll"), [(8, 1), (1024, 2)])
@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_all_rounds(shared, values, unroll, monkeypatch):
    """Against float64, with sums that were begun before; the same bits twice."""
    monkeypatch.setattr(triton_union_sums, "ROUND_BYTES", 5 * BLOCK)
    monkeypatch.setattr(triton_union_sums, "SUMS", triton_union_sums.SUMS._replace(values=values, unroll=unroll))
    u, kv_heads, width = unions_of(selection(), S, 0, T), 3 if shared else P, 5
    rounds, kept = triton_union_sums.rounds_of(u, 1), kv_heads if shared else 1
    before = torch.randn(B * P if shared else B, S, kv_heads, width)
    sums, again, expected = before.clone(), before.clone(), before.double()
    for number in rounds.numbers:
        low, high = rounds.lists[int(number[0]) :][:2].tolist()
        rows = torch.full((rounds.part + u.most, kept, width), torch.nan)
        for i in range(low, high):
            b, head = (i // u.tiles, slice(None)) if shared else divmod(i // u.tiles, P)
            for e in range(int(u.begin[i]), int(u.begin[i] + u.sizes[i])):
                rows[rounds.slots[e]] = row = torch.randn(kept, width)
                expected[b, u.tokens[e], head] += row.double() if shared else row[0].double()
        for some in (sums, again):
            triton_union_sums.add_rows(some, rows, u, rounds, number, shared)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=64 * 2**-24 * float(expected.abs().max()))
    assert torch.equal(sums, again)


def test_chunks_are_whole_tiles(monkeypatch):
    monkeypatch.setattr(token_unions, "TABLE_BYTES", 8 * 384 * 4 * 2)
    assert list(chunks_of_queries(B, P, T, S)) == [(0, 128), (128, 22)]
    assert list(chunks_of_queries(1, 1, 0, S)) == []
