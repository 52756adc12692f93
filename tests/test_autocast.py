"""Attention functions and ``fused_rope_qk`` follow autocast as ``F.scaled_dot_product_attention`` does."""

import dataclasses
import functools

import pytest
import torch
from torch.nn import functional as F

import kernel_index as ki
from kernel_index.core.testing import Maker, suites
from kernel_index.proofs.errors import clone_inputs, differentiable, run, tensors_of
from kernel_index.routing.block_router.api import block_router

SIZE = 20
CAST = {
    "attention": "q k v",
    "attention_with_lse": "q k v",
    "exact_token_attention": "q k v",
    "exact_token_attention_with_lse": "q k v",
    "block_sparse_attention": "q k v",
    "moba_attention": "q k v",
    "moba_attention_with_lse": "q k v",
    "clustered_sparse_attention": "q k v",
    "fa4_kvcache_decode": "q k v",
    "moba_decode": "q k v",
    "selected_decode": "q k v",
    "fused_rope_qk": "q k",
    "lightning_indexer": "q_idx k_idx weights",
    "lightning_indexer_loss": "q k",
    "importance_route": "q block_keys",
    "block_router": "q k",
    "ssd_scan": "x b c",
}
"""What autocast casts, for each function with a suite."""

CACHES = ("k_cache", "v_cache", "past_k", "past_v")
PLAIN = [
    dataclasses.replace(s, function=block_router)
    if s.op == "block_router"
    else s  # its suite compares scores of its own
    for s in suites()
]
SUITES = [s for s in PLAIN if s.op in CAST]


def caches_in(kwargs, dtype):
    return {n: v.to(dtype) if n in CACHES else v for n, v in kwargs.items()}


def mixed(suite, dtype=torch.bfloat16):
    """A call whose tensors have three dtypes, as a norm in float32 beside projections in bfloat16 leaves them."""
    kwargs = caches_in(suite.sized(Maker(torch.float32), SIZE), dtype)
    names = CAST[suite.op].split()
    dtypes = dict(zip(names, (torch.float32, torch.bfloat16, torch.float16), strict=False))
    return {n: v.to(dtypes[n]) if n in dtypes else v for n, v in kwargs.items()}


def by_hand(suite, dtype=torch.bfloat16):
    def call(**kwargs):
        lowered = {n: v.to(dtype) if n in CAST[suite.op].split() else v for n, v in kwargs.items()}
        return suite.function(**lowered)

    return call


def lowered(suite, **options):
    """All in bfloat16, as a call comes out of autocast's casts."""
    return suite.sized(Maker(torch.bfloat16, **options), SIZE)


def calls(wanted):
    return [
        pytest.param(s, b.name, id=f"{s.op}-{b.name}")
        for s in wanted
        for b in s.backends
        if ki.explain(s.function, **lowered(s), backend=b.name).verdicts[b.name] is None
    ]


def results(function, kwargs, names, **options):
    """All tensors of the result, and the gradients of ``names``."""
    if not names:
        return tensors_of(function(**kwargs, **options)), []
    return run(function, kwargs, names, **options)


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_the_rule_is_pytorchs():
    """Three dtypes become one; float64 is left, and beside another dtype it is refused."""
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16))
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", low):
            expected = F.scaled_dot_product_attention(q, k, v).dtype
            assert ki.attention(q, k, v).dtype == expected == low
            assert ki.attention(*[q.double()] * 3).dtype == F.scaled_dot_product_attention(*[q.double()] * 3).dtype
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(q, k, v.double())
            with pytest.raises(TypeError, match=r"v must be torch\.\w+ like q, got torch.float64"):
                ki.attention(q, k, v.double())


@pytest.mark.parametrize(("suite", "backend"), calls(SUITES))
@pytest.mark.thorough_if(when=lambda suite, backend: backend == "triton")
def test_mixed_dtypes_are_the_call_that_is_cast_by_hand(suite, backend):
    kwargs = mixed(suite)
    names = differentiable(suite, kwargs, backend)
    expected = results(by_hand(suite), clone_inputs(kwargs), names, backend=backend)

    def under_autocast(**call):
        with torch.autocast("cpu", torch.bfloat16):
            return suite.function(**call, backend=backend)

    found = results(under_autocast, clone_inputs(kwargs), names)
    for part in (0, 1):
        same(found[part], expected[part])


@pytest.mark.parametrize(("suite", "backend"), calls(PLAIN))
@pytest.mark.thorough_if(when=lambda suite, backend: backend == "triton")
def test_the_kernel_itself_runs_without_autocast(suite, backend):
    """Float32 arithmetic inside a backend stays float32: the same bits as outside of autocast, backward included."""
    kwargs = lowered(suite, scale=4.0)
    names = differentiable(suite, kwargs, backend)
    if backend == "reference":
        names = []  # its backward is PyTorch's own, which does follow an autocast around backward()
    expected = results(suite.function, clone_inputs(kwargs), names, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(suite.function, clone_inputs(kwargs), names, backend=backend)
    for part in (0, 1):
        same(found[part], expected[part])


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_without_autocast_mixed_dtypes_are_refused(suite):
    with pytest.raises(TypeError, match=r"must be torch\.\w+ like [qx]"):
        suite.function(**mixed(suite))


@pytest.mark.parametrize("suite", [s for s in SUITES if set(CACHES) & set(mixed(s))], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_cache_that_autocast_did_not_make_is_written_in_its_own_dtype(suite, backend):
    """A cache is no argument that could be cast: the step is computed in its dtype and the result is autocast's."""
    kwargs = caches_in(mixed(suite), torch.float32)
    expected = by_hand(suite, torch.float32)(**clone_inputs(kwargs), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = suite.function(**clone_inputs(kwargs), backend=backend)
    same(found[1:], expected[1:])
    same(found[:1], [expected[0].bfloat16()])


@pytest.mark.parametrize("suite", [s for s in SUITES if not set(CACHES) & set(mixed(s))], ids=str)
def test_torch_compile_traces_the_casts_into_one_graph(suite):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    kwargs = mixed(suite)
    under = torch.compile(functools.partial(suite.function, backend="reference"), fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = under(**kwargs)
    assert len(graphs) == 1
    expected = by_hand(suite)(**kwargs, backend="reference")
    same(tensors_of(found), tensors_of(expected))


def test_functions_without_a_suite():
    q, k, v = (torch.randn(1, 16, 2, 8, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16))
    config = ki.ClusteredSparseConfig(block_size=4, topk=2)
    calls = {
        ki.clustered_sparse_attention_with_lse: ((q, k, v), {"config": config}),
        ki.clustered_route: ((q, k), {"config": config}),
        ki.moba_route: ((q, k), {"block_size": 4, "topk": 2}),
    }
    for function, (tensors, options) in calls.items():
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*tensors, **options)
        same(found, function(*(t.bfloat16() for t in tensors), **options))
    selection = ki.lightning_indexer(q, q[:, :, 0].contiguous(), q[..., 0].contiguous(), topk=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ki.lightning_indexer_loss(selection, q, k)
    same([loss], [ki.lightning_indexer_loss(selection, q.bfloat16(), k)])


def test_a_sink_keeps_its_dtype_and_its_gradient():
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    sink = torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ki.attention(q, k, v, sink=sink, backend="reference")
    (gradient,) = torch.autograd.grad(out.sum(), sink)
    low = ki.attention(*(t.bfloat16() for t in (q, k, v)), sink=sink, backend="reference")
    same([gradient], torch.autograd.grad(low.sum(), sink))
