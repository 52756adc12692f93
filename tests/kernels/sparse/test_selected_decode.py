"""Decoding over a selection: what is read, what is refused, and how a selection of the caller's becomes tokens."""

import itertools

import pytest
import torch

import kernel_index as ki

B, H, K, D, PAGE = 2, 4, 2, 8, 6
BACKENDS = ["triton", "native", "sdpa", "reference"]


def qkv(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, tokens, heads, D, generator=g) for heads in (H, K, K))


def opened(kind, new, past=0):
    """A cache that holds ``past`` tokens of each row, with a step of ``new`` tokens open; what it holds."""
    _, k, v = qkv(past, seed=1)
    if kind == "contiguous":
        cache = ki.ContiguousKVCache(1, B, 64, K, D)
        begin = cache.begin
    else:
        cache = ki.PagedKVCache(1, 24, PAGE, K, D)
        rows = [cache.allocate() for _ in range(B)]
        begin = lambda tokens: cache.begin(rows, tokens)  # noqa: E731
    if past:
        begin(past)
        cache.append(0, k, v)
        cache.advance()
    begin(new)
    return cache, k, v


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize(("block_size", "window"), [(1, None), (4, None), (1, 5), (4, 5), (1000, None)])
def test_selecting_everything_is_dense_decoding(kind, backend, block_size, window):
    past, new = 19, 3
    q, k, v = qkv(new)
    cache, *_ = opened(kind, new, past)
    other, *_ = opened(kind, new, past)
    blocks = torch.arange(-(-(past + new) // block_size)).expand(B, new, K, -1)
    step = {"k": k, "v": v, "window_size": (window, 0), "backend": backend}
    out = ki.selected_decode(q, cache, blocks, block_size=block_size, **step)
    assert_same(out, ki.fa4_kvcache_decode(q, **step | {"backend": "reference"}, **other.layer(0)))
    assert torch.equal(cache.k, other.k)
    assert torch.equal(cache.v, other.v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_exactly_the_selected_tokens_are_read(kind, backend):
    """NaN in every other slot, the query's own token included, has no influence; and a query without tokens gives 0."""
    q, k, v = qkv(2)
    clean, *_ = opened(kind, 2, 20)
    dirty, *_ = opened(kind, 2, 20)
    tokens = torch.tensor([[[3, 3, -1, 17], [-1, -1, -1, -1]], [[0, 21, 19, 20], [5, 21, 2, -1]]])
    kept = torch.zeros(B, 22, dtype=torch.bool)
    for b in range(B):
        kept[b, tokens[b][tokens[b] >= 0]] = True
    bad_k, bad_v = (x.masked_fill(~kept[:, 20:, None, None], torch.nan) for x in (k, v))
    for cache in (dirty.k, dirty.v):
        flat = cache[0].flatten(0, 1)
        for b in range(B):
            for s in range(20):
                slot = b * 64 + s if kind == "contiguous" else dirty.pages(b)[s // PAGE] * PAGE + s % PAGE
                if not kept[b, s]:
                    flat[slot] = torch.nan
    expected = ki.selected_decode(q, clean, tokens, k=k, v=v, backend=backend)
    out = ki.selected_decode(q, dirty, tokens, k=bad_k, v=bad_v, backend=backend)
    assert torch.equal(out, expected)
    assert not out[0, 1].any()
    assert out[1, 1].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_selection_and_an_empty_cache_give_0(backend):
    q, k, v = qkv(1)
    cache, *_ = opened("paged", 1, 12)
    nothing = torch.zeros(B, 1, 0, dtype=torch.int32)
    assert not ki.selected_decode(q, cache, nothing, k=k, v=v, backend=backend).any()
    cache, *_ = opened("contiguous", 0)
    assert not ki.selected_decode(q, cache, torch.full((B, 1, 2), -1), backend=backend).any()


def test_nan_outside_the_selection_leaves_gradients_alone():
    q, k, v = (x.requires_grad_() for x in qkv(2))
    cache, *_ = opened("paged", 2, 20)
    cache.k[0].masked_fill_(torch.ones_like(cache.k[0], dtype=torch.bool), torch.nan)
    tokens = torch.tensor([[[20, -1], [21, 20]], [[-1, -1], [21, -1]]])
    out = ki.selected_decode(q, cache, tokens, k=k, v=v)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_and_repeats_have_no_meaning(backend):
    q, k, v = qkv(1)
    outs = []
    for tokens in ([1, 5, 9], [9, 5, 1], [5, 9, 9, 1, -1, 5]):
        cache, *_ = opened("paged", 1, 12)
        outs.append(ki.selected_decode(q, cache, torch.tensor([[tokens]] * B), k=k, v=v, backend=backend))
    assert_same(outs[1], outs[0])
    assert_same(outs[2], outs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_that_was_written_is_not_written_again(backend):
    q, k, v = qkv(1)
    cache, *_ = opened("paged", 1, 12)
    layer = cache.layer(0)
    layer.write(k, v)
    tokens = torch.tensor([[[3, 12]]] * B)
    version = cache.k._version
    out = ki.selected_decode(q, layer, tokens, k=k, v=v, backend=backend)
    assert torch.equal(ki.selected_decode(q, layer, tokens, backend=backend), out)
    assert cache.k._version == version


def test_gradients_are_those_of_the_step_alone():
    q, k, v = (x.requires_grad_() for x in qkv(3))
    cache, past_k, past_v = opened("paged", 3, 9)
    tokens = torch.tensor([[[0, 4, 9], [10, 9, 3], [11, 2, 10]]] * B)
    with ki.receipts() as log:
        out = ki.selected_decode(q, cache, tokens, k=k, v=v)
    assert log[0].ran == "reference"
    assert dict(log[0].declined)["native"].startswith("has no backward")
    keys, values = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
    mask = ki.MaskContract(q_offset=9)
    expected = ki.exact_token_attention(q, keys, values, tokens, mask=mask, backend="reference")
    assert_same(out, expected)
    for grads in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected)), strict=True):
        assert_same(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.full((B, 1, 2), 9)}, ValueError, "indices must be below 5, or -1 for none, got 9"),
        ({"indices": torch.full((B, 1, 2), -2)}, ValueError, "indices must be below 5, or -1 for none, got -2"),
        ({"indices": torch.zeros(B, 2)}, TypeError, "indices must be int32 or int64, got torch.float32"),
        ({"indices": torch.zeros(B, 1, H, 2, dtype=torch.int32)}, ValueError, r"indices must be \[B, Lq, K, n\]"),
        ({"indices": torch.zeros(B, 2, dtype=torch.int32)}, ValueError, r"indices must be \[B, Lq, K, n\] or"),
        ({"indices": None}, TypeError, "indices must be a torch.Tensor, got NoneType"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"k": torch.zeros(B, 2, K, D), "v": torch.zeros(B, 2, K, D)}, ValueError, "k must be of the 1 new tokens"),
        ({"v": None}, ValueError, "v must be given where k is"),
        ({"cache": {}}, TypeError, "cache must be a KVCache or what its layer"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
        ({"backend": "sdpa", "softcap": 2.0}, ki.Ineligible, "scaled_dot_product_attention has no softcap"),
    ],
)
def test_a_refused_step_writes_nothing_and_keeps_its_turn(change, error, message):
    q, k, v = qkv(1)
    cache, *_ = opened("contiguous", 1, 4)
    before = cache.k.clone()
    call = {"q": q, "cache": cache, "indices": torch.tensor([[[0, 4]]] * B), "k": k, "v": v}
    with pytest.raises(error, match=message):
        ki.selected_decode(**call | change)
    assert torch.equal(cache.k, before)
    ki.selected_decode(**call)
    with pytest.raises(ValueError, match="not yet served"):
        ki.selected_decode(**call)


def test_rows_that_end_together():
    cache = ki.PagedKVCache(1, 8, 4, 1, 1)
    rows = [cache.allocate(), cache.allocate()]
    x = torch.arange(12.0).view(2, 6, 1, 1)
    cache.begin(rows, 6)
    cache.append(0, x, x)
    cache.advance([6, 2])
    cache.begin(rows, 0)
    keys, first = cache.layer(0).right_aligned_keys()
    assert first.tolist() == [0, 4]
    assert keys[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert keys[1, 4:, 0, 0].tolist() == [6, 7]


@pytest.mark.parametrize("row_bytes", [16, 48, 160, 256, 512, 600, 1024])
@pytest.mark.parametrize("heads", [1, 8, 16, 24])
def test_plans_fit(heads, row_bytes):
    """Tiles are powers of 2 that fit into memory, splits hold all tiles, and an aligned tile crosses no boundary."""
    from kernel_index.kernels.sparse.selected_decode import triton

    for block_size, page, selected, pairs in itertools.product(
        (1, 5, 16, 48, 64, 4096), (0, 6, 16, 64), (1, 16, 300), (1, 256)
    ):
        p = triton.plan(pairs, heads, selected, block_size, page, row_bytes, 132)
        assert p.block_keys & (p.block_keys - 1) == 0
        assert p.block_keys >= 16
        assert p.block_rows >= heads
        assert 2 * p.num_stages * p.block_keys * row_bytes <= 200_000
        tiles = -(-selected * block_size // p.block_keys)
        assert (p.splits - 1) * p.per_split < tiles <= p.splits * p.per_split
        assert p.splits <= triton.MOST_SPLITS
        if p.aligned:
            assert block_size % p.block_keys == page % p.block_keys == 0
