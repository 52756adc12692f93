"""``moba_decode`` on Triton: what a captured step sees again, and that it selects the reference's blocks.

The interpreter takes 0.1 s for a program, so without a GPU there are fewer cases.
"""

import itertools

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.sparse.moba_block_sparse import contract, decoding
from kernel_index.kernels.sparse.selected_decode import triton as selected
from kernel_index.kvcache.selected import Visible
from kernel_index.kvcache.slots import slots

B, H, K, D = 2, 2, 1, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["contiguous", "paged 8", "paged 3"]


def some(cases, few):
    """All cases on a GPU, and ``few`` of them, which differ in everything, without one."""
    return list(cases) if DEVICE == "cuda" else few


def qkv(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, tokens, heads, D, generator=g).to(DEVICE) for heads in (H, K, K))


def new_cache(kind, tokens, rows=B, heads=K):
    """A cache for ``tokens`` tokens of each row, and what begins a step."""
    if kind == "contiguous":
        cache = ki.ContiguousKVCache(1, rows, tokens, heads, D, device=DEVICE)
        return cache, cache.begin
    page = int(kind.split()[1])
    cache = ki.PagedKVCache(1, rows * (-(-tokens // page) + 1), page, heads, D, device=DEVICE)
    names = [cache.allocate() for _ in range(rows)]
    return cache, lambda count: cache.begin(names, count)


class Replayed:
    """One step whose tensors keep their addresses: a captured graph on a GPU, the same launches again elsewhere.

    What a step of the cache has on the host is that of the first call for ever, as it is in a captured graph.
    """

    def __init__(self, kind, tokens, new, **options):
        self.cache, begin = new_cache(kind, tokens)
        begin(new)
        step = self.cache._step
        paged = step.table is not None
        columns = -(-tokens // self.cache.k.shape[2]) if paged else 0
        self.lengths = torch.zeros(B, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(B, columns, dtype=torch.int32, device=DEVICE) if paged else None
        self.step = type(step)(step.tokens, self.lengths, self.table, set(), step.rows)
        self.q, self.k, self.v = qkv(new)
        self.options, self.graph = options, None

    def _launch(self):
        self.cache._step = self.step
        self.step.served.clear()
        return ki.moba_decode(self.q, self.cache, k=self.k, v=self.v, backend="triton", **self.options)

    def __call__(self, like, q, k, v):
        """The step that the other cache has open, with this one's memory."""
        self.lengths.copy_(like._step.lengths)
        if self.table is not None:
            self.table.fill_(-1)
            self.table[:, : like._step.table.shape[1]] = like._step.table
        for own, given in ((self.q, q), (self.k, k), (self.v, v)):
            own.copy_(given)
        if DEVICE == "cpu":
            return self._launch()
        if self.graph is None:
            self._launch()  # compiles
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self._launch()
        self.graph.replay()
        return self.out


OPTIONS = [{}, {"window_size": (9, 0), "route_per": "kv_group"}, {"softcap": 2.0, "topk": 2}]


@pytest.mark.parametrize(
    ("kind", "options"), some(itertools.product(KINDS, OPTIONS), list(zip(KINDS, OPTIONS, strict=True))), ids=str
)
@pytest.mark.thorough_if(when=lambda kind, options: not options or "softcap" not in options)
@pytest.mark.thorough
def test_a_captured_step_serves_every_later_step(kind, options):
    options = {"block_size": 4, "topk": 3} | options
    total, new = 46, (2 if "softcap" in options else 1)
    cache, begin = new_cache(kind, total)
    replayed = Replayed(kind, total, new, **options)
    for step in range(20):
        q, k, v = qkv(new, seed=step)
        begin(new)
        again = replayed(cache, q, k, v).clone()
        fresh = ki.moba_decode(q, cache, k=k, v=v, backend="triton", **options)
        kept = [new, max(0, new - step % 2)]  # rows of different lengths
        cache.advance(kept)
        assert torch.equal(again, fresh), step
        assert torch.equal(replayed.cache.k, cache.k)
        assert torch.equal(replayed.cache.v, cache.v)
        begin(0)
        expected = cache.layer(0).block_means(4)
        means = replayed.cache._means[4]
        stored, other = means.values[0], cache._means[4].values[0]
        assert expected.shape[1] == max(cache.lengths if kind == "contiguous" else lengths_of(cache)) // 4
        assert torch.equal(stored, other)


def lengths_of(cache):
    return [cache.length(row) for row in cache._stepping]


def test_means_of_a_step_are_those_of_its_keys():
    """Against means from scratch, through short and long steps, blocks and pages that do not fit each other."""
    for kind, size in some(
        itertools.product(KINDS, (1, 3, 4, 8, 20)), [("contiguous", 3), ("paged 3", 4), ("paged 8", 20)]
    ):
        cache, begin = new_cache(kind, 60)
        past = torch.zeros(B, 0, K, D, device=DEVICE)
        for step, new in enumerate((5, 1, 17, 1, 2, 32)):
            q, k, v = qkv(new, seed=step)
            begin(new)
            layer = cache.layer(0)
            ki.moba_decode(q[:, :0], layer, k=k, v=v, block_size=size, topk=2, backend="triton")
            past = torch.cat([past, k], 1)
            whole = past.shape[1] // size
            expected = past[:, : whole * size].unflatten(1, (whole, size)).mean(2)
            torch.testing.assert_close(layer.block_means(size), expected, rtol=1e-6, atol=1e-6)
            cache.advance()
        assert cache._means[size].computed == B * (58 // size)


def test_blocks_of_an_abandoned_step_are_averaged_again():
    cache, begin = new_cache("contiguous", 20)
    call = {"block_size": 4, "topk": 2, "backend": "triton"}
    for seed in (1, 2):
        q, k, v = qkv(9, seed)
        begin(9)
        ki.moba_decode(q[:, :0], cache, k=k, v=v, **call)
    expected = k[:, :8].unflatten(1, (2, 4)).mean(2)
    torch.testing.assert_close(cache._means[4].values[0][:, :2], expected, rtol=1e-6, atol=1e-6)


def test_blocks_that_other_functions_completed_are_caught_up():
    q, k, v = qkv(18, seed=3)
    outs = []
    for backend in ("triton", "reference"):
        cache, begin = new_cache("paged 3", 20)
        begin(17)
        ki.fa4_kvcache_decode(q[:, :17], k=k[:, :17], v=v[:, :17], **cache.layer(0))
        cache.advance()
        begin(1)
        call = {"k": k[:, 17:], "v": v[:, 17:], "block_size": 4, "topk": 2, "backend": backend}
        outs.append(ki.moba_decode(q[:, 17:], cache, **call))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def selections(call):
    """The blocks of the kernels and of the plain formula, over a cache whose step has been written."""
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    cache, q, block_size = call.cache, call.q, call.block_size
    means = cache.stored_means(block_size)
    left = -1 if call.window[0] is None else call.window[0]
    seen = Visible(cache["cache_seqlens"], cache["block_table"], cache.new_tokens, left)
    g = triton.geometry_for(q, cache["k_cache"], seen, call.groups, block_size, call.topk)
    work, topk = torch.full((g.memory,), torch.nan, device=q.device), g.topk
    triton.select(q, means, seen, g, work)
    found = work.view(torch.int32)[: call.q.shape[0] * q.shape[1] * call.groups * topk]
    found = found.view(*q.shape[:2], call.groups, topk)
    expected = decoding.select(call).selected.indices
    return found, torch.nn.functional.pad(expected, (0, topk - expected.shape[-1]), value=-1)


def prepared(kind, q, k, lengths, block_size, topk, window=None, route_per="query_head"):
    """A step of q's queries over rows that hold the first tokens of k, its keys written."""
    cache, begin = new_cache(kind, k.shape[1], *k.shape[:3:2])
    new, past = q.shape[1], k.shape[1] - q.shape[1]
    begin(past)
    cache.append(0, k[:, :past], k[:, :past])
    cache.advance(lengths)
    begin(new)
    layer = cache.layer(0)
    layer.write(k[:, past:], k[:, past:])
    layer.block_means(block_size)
    more = (block_size, topk, (window, 0), route_per, None, 0.0)
    return contract.check_decode(q, layer, k[:, past:], k[:, past:], *more)


@pytest.mark.parametrize(
    ("kind", "new", "window", "route_per", "topk"),
    some(
        itertools.product(KINDS, (1, 3), (None, 0, 9, 30), contract.ROUTES, (1, 3, 7, 40)),
        [
            ("contiguous", 1, None, "query_head", 3),
            ("paged 8", 1, 30, "kv_group", 7),
            ("paged 3", 3, 9, "query_head", 3),
            ("paged 3", 2, None, "kv_group", 40),
            ("contiguous", 1, 0, "query_head", 2),
            ("paged 3", 1, None, "query_head", 1),
        ],
    ),
)
def test_selections_are_the_references(kind, new, window, route_per, topk):
    g = torch.Generator().manual_seed(new)
    q, k = (torch.randn(3, n, heads, D, generator=g).to(DEVICE) for n, heads in ((new, 4), (66 + new, 2)))
    found, expected = selections(prepared(kind, q, k, [66, 2, 41], 4, topk, window, route_per))
    assert torch.equal(found, expected)
    assert (found >= 0).any()
    found, expected = selections(prepared(kind, q, k, [0, 5, 64], 4, topk, window, route_per))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("topk", [2, 4])
def test_ties_are_the_references(topk):
    """Equal blocks, zeros of both signs, infinities and NaN: the smallest index, and NaN above everything."""
    kinds = (1.0, 0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan)
    pairs = some(itertools.product(kinds, kinds), list(zip(kinds, (*kinds[3:], *kinds[:3]), strict=True)))
    q, k = torch.ones(len(pairs), 1, 1, D, device=DEVICE), torch.ones(len(pairs), 33, 1, D, device=DEVICE)
    for row, (value, other) in enumerate(pairs):
        k[row, 8:12] = k[row, 20:28] = value
        k[row, 4:8] = k[row, 12:16] = other
    found, expected = selections(prepared("paged 3", q, k, [32 - row % 3 for row in range(len(pairs))], 4, topk))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["contiguous", "paged 3"])
def test_nothing_but_the_selected_blocks_is_read(kind):
    """NaN in all other blocks changes no bit, once their means are known."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(B, n, heads, D, generator=g).to(DEVICE) for n, heads in ((1, H), (48, K)))
    call = prepared(kind, q, k, [47, 30], 4, 3)
    clean = decoding.decode_triton(call)
    used = torch.zeros(B, 49, dtype=torch.bool, device=DEVICE)
    for b, blocks in enumerate(decoding.select(call).selected.indices.flatten(1)):
        for block in blocks.tolist():
            used[b, 4 * block : 4 * block + 4] = block >= 0
    assert 0 < used.sum() < used.numel() / 2
    token = torch.arange(48, device=DEVICE).expand(B, -1)
    at = slots(call.cache["block_table"], token, call.cache["k_cache"].shape[1])
    for cache in (call.cache["k_cache"], call.cache["v_cache"]):
        cache[at] = cache[at].masked_fill(~used[:, :48, None, None], torch.nan)
    assert call.cache["k_cache"].isnan().any()
    assert torch.equal(decoding.decode_triton(call), clean)


def test_more_blocks_than_registers_hold(monkeypatch):
    from kernel_index.kernels.sparse.moba_block_sparse import triton

    triton.geometry_of.cache_clear()
    monkeypatch.setattr(triton, "MOST_RANKED", 16)
    g = torch.Generator().manual_seed(0)
    q = torch.ones(B, 1, 1, D, device=DEVICE)
    k = torch.randint(-2, 3, (B, 100, 1, 1), generator=g).float().expand(-1, -1, -1, D).to(DEVICE)  # with many ties
    for topk, window in ((2, None), (9, None), (33, 70), (50, None)):
        found, expected = selections(prepared("contiguous", q, k, [99, 60], 2, topk, window))
        assert torch.equal(found, expected)
    triton.geometry_of.cache_clear()


def test_a_capacity_that_has_too_many_scores(monkeypatch):
    """Then the selection is the plain one, and the result the same."""
    q, k, v = qkv(40, seed=5)
    outs = []
    for most in (decoding.SCORES, 0):
        monkeypatch.setattr(decoding, "SCORES", most)
        cache, begin = new_cache("contiguous", 40)
        begin(39)
        ki.moba_decode(q[:, :0], cache, k=k[:, :39], v=v[:, :39], block_size=4, topk=3, backend="triton")
        cache.advance()
        begin(1)
        new = {"k": k[:, 39:], "v": v[:, 39:]}
        outs.append(ki.moba_decode(q[:, 39:], cache, **new, block_size=4, topk=3, backend="triton"))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processors", [1, 64], ids=["one split", "merged splits"])
def test_a_sink_is_one_term_of_the_denominator(monkeypatch, processors):
    """Whether one program holds all blocks of a query or the states of several are merged."""
    plans, launch_of = [], selected.launch_of
    monkeypatch.setattr(selected, "processors", lambda q: processors)
    monkeypatch.setattr(selected, "launch_of", lambda *sizes: plans.append(launch_of(*sizes)) or plans[-1])
    sink, outs = torch.tensor([-1.0, 2.0], device=DEVICE), {}
    for backend in ("triton", "reference"):
        cache, begin = new_cache("contiguous", 300)
        begin(300)
        q, k, v = qkv(300)
        outs[backend] = ki.moba_decode(
            q[:, -2:], cache, k=k, v=v, block_size=8, topk=30, sink=sink, route_per="kv_group", backend=backend
        )
    assert (plans[0].plan.splits > 1) == (processors > 1)
    torch.testing.assert_close(outs["triton"], outs["reference"])
