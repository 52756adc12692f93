"""Decoding through a cache equals recomputing everything; gates, receipts, and calls that are refused unwritten."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.fa4_support import TABLE, support_of
from kernel_index.core.target import Target
from kernel_index.kernels.attention.dense_fa4_kvcache_decode import contract

H, K, D, PAGE = 4, 2, 8, 4
NATIVE = native.machine_why_not() is None


def stream(tokens: int, rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, tokens, heads, D, generator=g) for heads in (H, K, K))


def a_call(**changes):
    """A good call on a paged cache: three rows of two pages each."""
    q, k, v = stream(1)
    call = {
        "q": q,
        "k_cache": torch.randn(8, PAGE, K, D),
        "v_cache": torch.randn(8, PAGE, K, D),
        "cache_seqlens": torch.tensor([5, 0, 3], dtype=torch.int32),
        "k": k,
        "v": v,
        "block_table": torch.tensor([[7, 2], [1, 0], [4, 3]], dtype=torch.int32),
    }
    return call | changes


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 1, 3, 2], [11]], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (3, 0)}, {"softcap": 1.5}], ids=["plain", "window", "softcap"])
def test_token_by_token_equals_full_recomputation(backend, kind, chunks, options):
    if backend == "sdpa" and "softcap" in options:
        pytest.skip("scaled_dot_product_attention has no softcap")
    q, k, v = stream(11)
    window, softcap = options.get("window", (None, None)), options.get("softcap", 0.0)
    expected = ki.attention(q, k, v, ki.MaskContract(window=window), softcap=softcap, backend="reference")
    if kind == "contiguous":
        cache = ki.ContiguousKVCache(1, 3, 12, K, D)
    else:
        cache = ki.PagedKVCache(1, 12, PAGE, K, D)
        rows = [cache.allocate() for _ in range(3)]
    outs, at = [], 0
    for count in chunks:
        cache.begin(count) if kind == "contiguous" else cache.begin(rows, count)
        part = slice(at, at + count)
        out = ki.fa4_kvcache_decode(
            q[:, part], k=k[:, part], v=v[:, part], window_size=window, softcap=softcap, backend=backend,
            **cache.layer(0),
        )  # fmt: skip
        cache.advance()
        outs.append(out)
        at += count
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_ragged_rows_equal_each_row_alone(backend):
    q, k, v = stream(9)
    lengths = [8, 2, 5]
    cache = ki.PagedKVCache(1, 12, PAGE, K, D)
    rows = [cache.allocate() for _ in lengths]
    cache.begin(rows, 8)
    cache.append(0, k[:, :8], v[:, :8])
    cache.advance(lengths)
    cache.begin(rows, 1)
    new_k, new_v = (torch.stack([x[b, n : n + 1] for b, n in enumerate(lengths)]) for x in (k, v))
    new_q = torch.stack([q[b, n : n + 1] for b, n in enumerate(lengths)])
    out = ki.fa4_kvcache_decode(new_q, k=new_k, v=new_v, backend=backend, **cache.layer(0))
    for b, n in enumerate(lengths):
        alone = ki.attention(q[b : b + 1, : n + 1], k[b : b + 1, : n + 1], v[b : b + 1, : n + 1], backend="reference")
        torch.testing.assert_close(out[b], alone[0, -1:], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"window_size": (300, 0)}, {"window_size": (20, 0)}], ids=str)
@pytest.mark.parametrize("length", [0, 255, 597])
def test_triton_merges_its_splits(length, options):
    """Up to 16 splits of about 37 keys; lengths near their ends, windows narrower than one."""
    q, k, v = (x[:, :, :1] for x in stream(2, rows=1))
    cache = [torch.randn(1, 600, 1, D) for _ in range(2)]
    cache[1][:, length + 2 :] = float("nan")
    call = {"cache_seqlens": length, "k": k, "v": v, **options}
    assert triton_plan().most == 9
    expected = ki.fa4_kvcache_decode(q, *(c.clone() for c in cache), **call, backend="reference")
    actual = ki.fa4_kvcache_decode(q, *cache, **call, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def triton_plan():
    """Of one row and one KV head with two queries, on a device of 2 processors that run 4 programs each."""
    pytest.importorskip("triton")
    from kernel_index.kernels.attention.dense_fa4_kvcache_decode import triton

    return triton.plan(1, kv_heads=1, rows=2, row_bytes=4 * D, count=2)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_triton_shares_ragged_rows_out(queries):
    """A row of 500 keys beside rows of one and none: many splits, one split, an empty one; NaN in what none holds."""
    lengths = [500, 1, 0, 130]
    q, k, v = stream(queries, rows=4)
    cache = ki.PagedKVCache(1, 160, 16, K, D)
    rows = [cache.allocate() for _ in lengths]
    cache.begin(rows, 500)
    cache.append(0, *torch.randn(2, 4, 500, K, D))
    cache.advance(lengths)
    cache.begin(rows, queries)
    layer = cache.peek(0)
    expected = ki.fa4_kvcache_decode(q, k=k, v=v, backend="reference", **layer)
    written = cache.k.clone(), cache.v.clone()
    actual = ki.fa4_kvcache_decode(q, k=k, v=v, backend="triton", **layer)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    assert torch.equal(cache.k, written[0])
    assert torch.equal(cache.v, written[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window_size": (300, 0)}, {"window_size": (20, 3), "causal": False}], ids=str)
@pytest.mark.parametrize("length", [0, 255, 256, 530, 597])
def test_native_merges_its_splits(length, options, dtype):
    """Splits of 256 keys; lengths at their ends, windows that leave whole splits empty; any number of threads."""
    q, k, v = (x.to(dtype) for x in stream(2, rows=1))
    cache = [torch.randn(1, 600, K, D).to(dtype) for _ in range(2)]
    cache[1][:, length + 2 :] = float("nan")
    call = {"cache_seqlens": length, "k": k, "v": v, **options}
    wide = [x.clone().float() for x in cache]
    expected = ki.fa4_kvcache_decode(
        q.float(), *wide, **call | {"k": k.float(), "v": v.float()}, backend="reference"
    )  # fmt: skip
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(ki.fa4_kvcache_decode(q, *cache, **call, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3  # the result's own rounding
    torch.testing.assert_close(outs[0].float(), expected, rtol=tolerance, atol=tolerance)
    for a, e in zip(cache, wide, strict=True):
        assert torch.equal(a.float()[:, : length + 2], e[:, : length + 2])


def test_native_tells_autograd_what_it_wrote():
    call = a_call()
    saved = call["k_cache"].clone().requires_grad_().exp()  # exp keeps its result for backward
    kept = saved.detach()  # shares its memory and its version
    ki.fa4_kvcache_decode(**call | {"k_cache": kept}, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_native_wants_a_cache_that_it_can_write_in_place():
    call = a_call()
    call["k_cache"] = call["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ki.Ineligible, match="needs a contiguous cache"):
        ki.fa4_kvcache_decode(**call, backend="native")
    with ki.receipts() as log:
        ki.fa4_kvcache_decode(**call)
    assert log[0].ran == "sdpa"


def test_native_writes_through_no_table_that_was_not_checked():
    class Other(torch.Tensor):
        pass

    call = a_call()
    call["block_table"] = call["block_table"].as_subclass(Other)
    with pytest.raises(ki.Ineligible, match="needs a block table of plain values"):
        ki.fa4_kvcache_decode(**call, backend="native")


def test_a_page_of_an_empty_pool_is_out_of_range():
    empty = torch.zeros(0, PAGE, K, D)
    with pytest.raises(ValueError, match="block_table must hold page ids below 0, got 0"):
        ki.fa4_kvcache_decode(
            **a_call(k_cache=empty, v_cache=empty.clone(), block_table=torch.zeros(3, 2, dtype=torch.int32))
        )


def test_a_long_window_prompt_is_taken_in_chunks():
    q, k, v = stream(700, rows=1)
    cache = ki.ContiguousKVCache(1, 1, 700, K, D)
    cache.begin(700)
    out = ki.fa4_kvcache_decode(q, k=k, v=v, window_size=(33, 0), backend="sdpa", **cache.layer(0))
    expected = ki.attention(q, k, v, ki.MaskContract(window=(33, 0)), backend="reference")
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_slots_after_the_last_token_have_no_influence(backend):
    q, k, v = stream(1)
    lengths = torch.tensor([5, 0, 3], dtype=torch.int32)
    clean = [torch.randn(3, 8, K, D) for _ in range(2)]
    after = (torch.arange(8) >= lengths[:, None])[:, :, None, None]
    dirty = [x.masked_fill(after, float("nan")) for x in clean]
    outs = [ki.fa4_kvcache_decode(q, *c, cache_seqlens=lengths, k=k, v=v, backend=backend) for c in (clean, dirty)]
    assert torch.isfinite(outs[1]).all()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)


def test_lengths_are_not_advanced_and_only_new_slots_are_written():
    call = a_call()
    before = call["k_cache"].clone()
    ki.fa4_kvcache_decode(**call)
    assert call["cache_seqlens"].tolist() == [5, 0, 3]
    for row, (page, slot) in enumerate([(2, 1), (1, 0), (4, 3)]):
        assert torch.equal(call["k_cache"][page, slot], call["k"][row, 0])
        before[page, slot] = call["k"][row, 0]
    assert torch.equal(call["k_cache"], before)


GATES = (
    ("dense_fa4_kvcache_requires_causal", {"causal": False}),
    ("dense_fa4_kvcache_no_sliding_window", {"window_size": (128, 0)}),
    ("dense_fa4_kvcache_requires_append_kv", {"k": None, "v": None}),
    ("dense_fa4_kvcache_invalid_block_table_rank", {"block_table": torch.zeros(3, 2, 1, dtype=torch.int32)}),
    ("dense_fa4_kvcache_block_table_batch_mismatch", {"block_table": torch.zeros(2, 2, dtype=torch.int32)}),
    ("dense_fa4_kvcache_cuda_only", {}),
)


def fa4_verdict(**changes):
    return ki.explain("fa4_kvcache_decode", **a_call(**changes)).verdicts["fa4"]


@pytest.mark.parametrize("first", range(len(GATES)))
def test_gates_are_checked_in_order(first):
    """With this fault and every later one, this one's name is given."""
    faults = {}
    for _, change in reversed(GATES[first:]):
        faults |= change
    assert fa4_verdict(**faults) == GATES[first][0]


@pytest.mark.parametrize("window", [(-1, -1), (None, None), None, (-1, 0), (None, 0), (-7, -1), (-1, 5)], ids=str)
def test_every_spelling_of_global_passes(window):
    assert fa4_verdict(window_size=window) == "dense_fa4_kvcache_cuda_only"


def test_a_named_fa4_is_refused_with_the_reason_and_nothing_is_written():
    call = a_call(window_size=(2, 0))
    before = call["k_cache"].clone()
    with pytest.raises(ki.Ineligible, match="dense_fa4_kvcache_no_sliding_window"):
        ki.fa4_kvcache_decode(**call, backend="fa4")
    assert torch.equal(call["k_cache"], before)


def test_auto_serves_what_fa4_refuses_and_the_receipt_says_why():
    with ki.receipts() as log:
        ki.fa4_kvcache_decode(**a_call(window_size=(2, 0)))
        ki.fa4_kvcache_decode(**a_call(softcap=2.0))
    said = [dict(r.declined)["fa4"] for r in log]
    assert said == ["dense_fa4_kvcache_no_sliding_window", "dense_fa4_kvcache_cuda_only"]
    assert [r.ran for r in log] == (["native"] * 2 if NATIVE else ["sdpa", "reference"])


def tensor(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = (
    ({"cache_seqlens": tensor(5, 8, 3)}, ValueError, r"cache_seqlens must be at most 7, .* got 8"),
    ({"cache_seqlens": tensor(5, -1, 3)}, ValueError, "cache_seqlens must be at least 0, got -1"),
    ({"cache_seqlens": tensor(5, 0)}, ValueError, "cache_seqlens must be one length for each row"),
    ({"cache_seqlens": tensor(5, 0, 3, dtype=torch.float32)}, TypeError, "cache_seqlens must be an integer"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be at least 0"),
    ({"block_table": tensor([7, 2], [8, 0], [4, 3])}, ValueError, "block_table must hold page ids below 8, got 8"),
    ({"block_table": tensor([7, -1], [1, 0], [4, 3])}, ValueError, "block_table must hold page ids below 8, got -1"),
    ({"block_table": tensor([7, 2], [2, 0], [4, 3])}, ValueError, "written page to one row alone, got page 2"),
    ({"block_table": tensor([7, 2], [1, 0], [2, 3])}, ValueError, "written page to one row alone, got page 2"),
    ({"block_table": tensor([2, 2], [1, 0], [4, 3])}, ValueError, "written page to one row alone, got page 2"),
    ({"block_table": tensor([4, 2], [1, 0], [4, 3])}, ValueError, "written page to one row alone, got page 4"),
    ({"block_table": torch.zeros(3, 2)}, TypeError, "block_table must be an integer tensor"),
    ({"block_table": torch.zeros(3, 2, 1, dtype=torch.int32)}, ValueError, "invalid_block_table_rank"),
    ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "block_table_batch_mismatch"),
    ({"k": torch.zeros(3, 1, K, D, dtype=torch.bfloat16)}, TypeError, "k must be torch.float32 like q"),
    ({"v_cache": torch.zeros(8, PAGE, K, D, dtype=torch.float16)}, TypeError, "v_cache must be torch.float32"),
    ({"v_cache": torch.zeros(7, PAGE, K, D)}, ValueError, "v_cache must be of k_cache's shape"),
    ({"k": torch.zeros(3, 1, H, D)}, ValueError, "k must be .* the heads of the cache"),
    ({"v": torch.zeros(3, 2, K, D)}, ValueError, "v must be"),
    ({"k": None}, ValueError, "k must be given where v is"),
    ({"q": torch.zeros(3, 1, 3, D)}, ValueError, "q must be of a multiple of k_cache's 2 heads, got 3"),
    ({"q": torch.zeros(3, 1, H, 2 * D)}, ValueError, "k_cache must be of q's head size"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
    ({"causal": 1}, TypeError, "causal must be True or False"),
    ({"window_size": (1, 2, 3)}, ValueError, "window must be a pair"),
    ({"block_table": None}, ValueError, "k_cache must be of q's batch size where no table is given"),
)


@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_calls_raise_before_anything_is_written(changes, error, message, backend):
    call = a_call(**changes)
    before = [call["k_cache"].clone(), call["v_cache"].clone()]
    with pytest.raises(error, match=message):
        ki.fa4_kvcache_decode(**call, backend=backend)
    assert torch.equal(call["k_cache"], before[0])
    assert torch.equal(call["v_cache"], before[1])


def test_shared_pages_may_be_read_together():
    shared = tensor([4, 2], [4, 0], [4, 3])
    lengths = tensor(5, 4, 6)
    out = ki.fa4_kvcache_decode(**a_call(block_table=shared, cache_seqlens=lengths))
    assert out.shape == (3, 1, H, D)


def test_gradients_reach_q_and_the_new_tokens_and_the_cache_keeps_no_graph():
    call = a_call()
    for name in ("q", "k", "v"):
        call[name] = call[name].clone().requires_grad_()
    with ki.receipts() as log:
        out = ki.fa4_kvcache_decode(**call)
    assert log[0].ran == "reference"
    grads = torch.autograd.grad(out.sum(), [call[n] for n in ("q", "k", "v")])
    assert all(g.abs().sum() > 0 for g in grads)
    assert not call["k_cache"].requires_grad
    with pytest.raises(ki.Ineligible, match="has no backward"):
        ki.fa4_kvcache_decode(**a_call(q=call["q"]), backend="sdpa")
    with torch.no_grad(), ki.receipts() as log:
        ki.fa4_kvcache_decode(**call)
    assert log[0].ran == ("native" if NATIVE else "sdpa")


def test_a_length_may_be_one_number():
    call = a_call()
    copy = {name: x.clone() for name, x in call.items()}
    one = ki.fa4_kvcache_decode(**call | {"cache_seqlens": 3})
    assert torch.equal(one, ki.fa4_kvcache_decode(**copy | {"cache_seqlens": tensor(3, 3, 3)}))
    assert torch.equal(call["k_cache"], copy["k_cache"])


@pytest.fixture
def on_cuda(monkeypatch):
    """The rules after the gate, as on a Hopper with the package."""
    monkeypatch.setattr(contract, "fa4_package_why_not", lambda: None)

    def at(arch):
        monkeypatch.setattr(contract, "target_of", lambda device: Target("cuda", arch))

    at(90)
    return at


def rule(**changes):
    c = {"causal": True, "window_size": (None, None), "softcap": 0.0} | a_call(**changes)
    return contract.fa4_why_not(contract.check(**c, scale=None, sink=None))


def test_rules_after_the_gate(on_cuda):
    half = {n: a_call()[n].bfloat16() for n in ("q", "k", "v", "k_cache", "v_cache")}
    assert rule() == "flash-attn-4 takes float16 and bfloat16"
    assert rule(**half) is None
    wide = {n: torch.zeros(*x.shape[:3], 192, dtype=torch.bfloat16) for n, x in half.items()}
    assert rule(**wide) is None
    on_cuda(100)
    assert rule(**wide) == "flash-attn-4 does not take this head size on this architecture"
    on_cuda(75)
    assert rule(**half) == "flash-attn-4 does not know this architecture"


def test_capabilities_are_data():
    assert support_of(90).paged
    assert not support_of(90).split
    assert support_of(100).split
    assert not TABLE[8].paged
    assert not TABLE[12].paged
    assert support_of("gfx942") is None
    assert [s for s in (64, 128, 192, 256, 260) if support_of(90).takes_head_size(s)] == [64, 128, 192, 256]
    assert [s for s in (64, 128, 192, 256) if support_of(100).takes_head_size(s)] == [64, 128, 256]
    assert contract.pages_directly(support_of(90), 64)
    assert not contract.pages_directly(support_of(90), 72)  # padded to 80: cp.async takes no padded head
    assert not contract.pages_directly(support_of(80), 64)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_reads_no_length_one_by_one(rows, monkeypatch):
    """``.item()`` once per row is what made the public samples slow: the reference does not call it at all."""
    q, k, v = stream(1, rows)
    cache = [torch.zeros(rows, 8, K, D) for _ in range(2)]
    monkeypatch.setattr(contract.rules, "host_readable", lambda *tensors: False)  # as on a device
    calls = []
    for name in ("item", "tolist", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: calls.append(name))
    ki.fa4_kvcache_decode(q, *cache, cache_seqlens=torch.zeros(rows, dtype=torch.int32), k=k, v=v, backend="reference")
    assert calls == []
