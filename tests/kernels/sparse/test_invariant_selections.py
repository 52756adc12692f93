"""Under ``numerics("invariant")`` routed attention has the same bits packed or alone, and the values of its formula."""

import pytest
import torch

import kernel_index as ki
from tests.threads import with_threads

LENGTHS = (37, 5, 64, 90)
CONFIG = ki.ClusteredSparseConfig(block_size=8, topk=3)
SEARCHED = ki.ClusteredSparseConfig(block_size=4, topk=4, hierarchy=(3, 2), report_unions=True)


def moba(q, k, v, mask):
    return ki.moba_attention(q, k, v, block_size=8, topk=3, mask=mask)


def clustered(q, k, v, mask):
    return ki.clustered_sparse_attention(q, k, v, config=CONFIG, mask=mask)


def searched(q, k, v, mask):
    return ki.clustered_sparse_attention(q, k, v, config=SEARCHED, mask=mask)


def tokens(q, k, v, mask):
    selected = ki.lightning_indexer(q, k[:, :, 0], q[..., 0], topk=9, mask=mask)
    return ki.exact_token_attention(q, k, v, selected, mask=mask)


CALLS = (moba, clustered, searched, tokens)
pytestmark = pytest.mark.native


def drawn(dtype, lengths=LENGTHS):
    torch.manual_seed(0)
    return [[torch.randn(1, n, h, 16).to(dtype) for h in (4, 2, 2)] for n in lengths]


def gradients(call, qkv, mask, upstream):
    leaves = [x.clone().requires_grad_() for x in qkv]
    with ki.numerics("invariant"):
        out = call(*leaves, mask)
    return out, *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_packed_is_alone_forward_and_backward(call, dtype, window):
    documents = drawn(dtype)
    upstream = [torch.randn_like(q) for q, _, _ in documents]
    alone = [
        gradients(call, x, ki.MaskContract(window=(window, 0)), g) for x, g in zip(documents, upstream, strict=True)
    ]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        packed = [torch.cat([documents[i][x] for i in order], 1) for x in range(3)]
        ids = torch.cat([torch.full((LENGTHS[i],), i) for i in order])
        mask = ki.MaskContract(doc_ids=ids, window=(window, 0))
        g = torch.cat([upstream[i] for i in order], 1)
        for found in (gradients(call, packed, mask, g), with_threads(3, gradients, call, packed, mask, g)):
            for which, whole in enumerate(found):
                for i, part in zip(order, whole.split([LENGTHS[i] for i in order], 1), strict=True):
                    assert torch.equal(part, alone[i][which]), (order, i, which)


@pytest.mark.parametrize("call", CALLS)
def test_new_queries_over_a_prefix_are_those_of_the_whole(call):
    """As decoding calls it."""
    ((q, k, v),) = drawn(torch.float32, (90,))
    with ki.numerics("invariant"):
        if call is tokens:  # its indexer reads the same q
            weights = q[..., 0]
            whole = ki.lightning_indexer(q, k[:, :, 0], weights, topk=9)
            for at in (1, 17, 89):
                mask = ki.MaskContract(q_offset=at)
                some = ki.lightning_indexer(q[:, at:], k[:, :, 0], weights[:, at:], topk=9, mask=mask)
                assert torch.equal(some.indices, whole.indices[:, at:])
                assert torch.equal(some.scores, whole.scores[:, at:])
            return
        expected = call(q, k, v, ki.MaskContract())
        for at, end in ((0, 1), (17, 40), (89, 90)):
            mask = ki.MaskContract(q_offset=at)
            assert torch.equal(call(q[:, at:end], k[:, :end], v[:, :end], mask), expected[:, at:end])


@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_those_of_the_formula(call):
    ((q, k, v),) = drawn(torch.float32, (90,))
    upstream = torch.randn_like(q)
    found = gradients(call, (q, k, v), ki.MaskContract(), upstream)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with ki.force("reference"):
        out = call(*leaves, ki.MaskContract())
    exact = (out, *torch.autograd.grad(out, leaves, upstream.double()))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6)


def test_what_depends_on_the_batch_is_refused():
    ((q, k, v),) = drawn(torch.float32, (40,))
    config = ki.ClusteredSparseConfig(block_size=8, topk=3, dense_above=0.5)
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="dense_above decides by what the queries"):
        ki.clustered_sparse_attention(q, k, v, config=config)


def test_decoding_over_splits_of_its_own_is_refused():
    cache = ki.ContiguousKVCache(1, 1, 8, 2, 16)
    cache.begin(1)
    ((q, k, v),) = drawn(torch.float32, (1,))
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="has no invariant form"):
        ki.moba_decode(q, cache, k=k, v=v, block_size=2, topk=2)
