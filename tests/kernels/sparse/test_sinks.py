"""A sink and log-sum-exps of sparse attention: rows without a key, the invariant form, what is refused."""

import math

import pytest
import torch

import kernel_index as ki
from kernel_index.core.target import machine_why_not
from kernel_index.proofs.errors import floor, relative_error

BACKENDS = ("triton", "native", "cpu", "reference")
CONFIG = ki.ClusteredSparseConfig(block_size=4, topk=2, query_tile_size=8)
SINK = torch.tensor([0.3, -1.0, 2.0, 0.0])
HAS_KEYS = 4  # queries from here on


def drawn(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 12, heads, 8, generator=g) for heads in (4, 2, 2)]


def blocks(q, k, v, sink, **options):
    selected = torch.arange(12)[:, None] // 4 * torch.tensor([1, 0])  # the current block and the first one
    selected = selected.masked_fill(torch.arange(12)[:, None] < HAS_KEYS, -1).expand(1, 2, 12, 2).transpose(1, 2)
    return ki.block_sparse_attention(q, k, v, selected, block_size=4, sink=sink, **options)


def tokens(q, k, v, sink, **options):
    selected = torch.arange(12)[:, None] - torch.arange(3)
    selected = selected.masked_fill(torch.arange(12)[:, None] < HAS_KEYS, -1)[None]
    return ki.exact_token_attention_with_lse(q, k, v, selected, sink=sink, **options)


CALLS = (blocks, tokens)


def gradients(call, tensors, upstream, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = call(*leaves, **options)
    return found, torch.autograd.grad(tuple(found), leaves, upstream)


def upstream_of():
    """The gradients of what a row without a key gives are NaN."""
    g = torch.Generator().manual_seed(1)
    d_out, d_lse = torch.randn(1, 12, 4, 8, generator=g), torch.randn(1, 4, 12, generator=g)
    d_out[:, :HAS_KEYS], d_lse[..., :HAS_KEYS] = math.nan, math.nan
    return d_out, d_lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_rows_without_a_key_give_nothing_and_send_nothing(call, backend):
    if machine_why_not(backend):
        pytest.skip(machine_why_not(backend))
    found, grads = gradients(call, (*drawn(), SINK), upstream_of(), backend=backend)
    assert (found.out[:, :HAS_KEYS] == 0).all()
    assert found.lse[..., :HAS_KEYS].isneginf().all()
    assert found.lse[..., HAS_KEYS:].isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_sink_of_minus_infinity_is_none(call, backend):
    if machine_why_not(backend):
        pytest.skip(machine_why_not(backend))
    none = call(*drawn(), None, backend=backend)
    for one, other in zip(call(*drawn(), torch.full((4,), -torch.inf), backend=backend), none, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("call", CALLS)
def test_the_invariant_form_has_it_too(call, backend):
    if machine_why_not(backend):
        pytest.skip(machine_why_not(backend))
    tensors, upstream = (*drawn(), SINK), [x.nan_to_num() for x in upstream_of()]
    expected, of_reference = gradients(call, tensors, upstream, backend="reference")
    with ki.numerics("invariant"):
        found, grads = gradients(call, tensors, upstream, backend=backend)
    for one, other in zip((*found, *grads), (*expected, *of_reference), strict=True):
        finite = other.isfinite()
        assert torch.equal(one.isfinite(), finite)
        assert relative_error(one[finite].detach(), other[finite].detach()) <= 8 * floor(torch.float32)


@pytest.mark.parametrize(("name", "value"), [("report_unions", True), ("dense_above", 0.5)])
def test_unions_that_are_read_are_refused_in_a_trace(name, value):
    config = ki.ClusteredSparseConfig(4, 2, 8, **{name: value})
    q, k, v = drawn()
    ki.clustered_sparse_attention(q, k, v, config=config)
    call = torch.compile(
        lambda q, k, v: ki.clustered_sparse_attention(q, k, v, config=config), fullgraph=True, backend="eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"config\.{name} reads the sizes of unions"):
        call(q, k, v)


def test_the_rerouted_calls_have_the_sink():
    q, k, v = drawn()
    expected = ki.attention_with_lse(q, k, v, sink=SINK)
    found = ki.exact_token_attention_with_lse(q, k, v, None, sink=SINK)
    torch.testing.assert_close(tuple(found), tuple(expected))
    config = ki.ClusteredSparseConfig(4, 2, 8, dense_above=0.0)
    with ki.receipts() as log:
        found = ki.clustered_sparse_attention_with_lse(q, k, v, config=config, sink=SINK)
    assert log[0].details["path"] == "reroute_to_dense"
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_flash_attention_4_of_moba_declines_a_sink():
    q, k, v = drawn()
    explained = ki.explain(ki.moba_attention, q, k, v, block_size=4, topk=2, sink=SINK, backend="flash")
    assert explained.would_run != "flash"
