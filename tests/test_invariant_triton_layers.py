"""Selections, trees and the state-space mixer by Triton under ``numerics("invariant")``, interpreted."""

import pytest
import torch

pytest.importorskip("triton")

import kernel_index as ki
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.nn import Experts, HybridBlock, Mamba2
from tests.interpreter import rows_alone
from tests.test_invariant_triton import OPS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's order of a sum")
DOCUMENTS = torch.tensor([[0] * 19 + [1] * 22 + [2] * 4, [0] * 3 + [1] * 37 + [-1] * 5])
PARTS = ((0, 0, 19), (0, 19, 41), (0, 41, 45), (1, 3, 40))  # a row, and a document's first token and end


@pytest.fixture(autouse=True)
def _triton():
    with rows_alone(), ki.force("triton", *OPS, "ssd_scan", "causal_conv1d", "gated_rms_norm"):
        yield


def heads(tokens=45):
    torch.manual_seed(0)
    return [torch.randn(2, tokens, n, 24) for n in (4, 2, 2, 4)]  # q, k, v and an upstream gradient


def with_gradients(function, tensors, upstream):
    leaves = [x.clone().requires_grad_() for x in tensors]
    with ki.numerics("invariant"), ki.receipts() as log:
        out = function(*leaves)
    assert {r.ran for r in log} == {"triton"}
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def by_blocks(size, groups):
    """Attention to drawn blocks of each document; a query's are drawn by its place in the document."""
    chosen = torch.randint(-1, -(-45 // size), (45, groups, 3), generator=torch.Generator().manual_seed(1))

    def run(q, k, v, mask, within):
        selected = chosen[within].to(torch.int32)
        selected = torch.where(selected <= within[..., None, None] // size, selected, -1)
        return block_sparse_attention(q, k, v, selected, block_size=size, mask=mask, backend="triton").out

    return run


def routed(q, k, v, mask, within):
    return ki.moba_attention(q, k, v, block_size=4, topk=3, mask=mask)


def clustered(q, k, v, mask, within):
    config = ki.ClusteredSparseConfig(block_size=4, topk=3)
    return ki.clustered_sparse_attention(q, k, v, config=config, mask=mask)


def by_groups_of_blocks(q, k, v, mask, within):
    config = ki.ClusteredSparseConfig(block_size=2, topk=4, hierarchy=(3, 2))
    return ki.clustered_sparse_attention(q, k, v, config=config, mask=mask)


def exact_tokens(q, k, v, mask, within):
    index_q, index_k, weights = q[:, :, :2].detach(), k[:, :, 0].detach(), q[:, :, 2:, 0].detach()
    selected = ki.lightning_indexer(index_q, index_k, weights, topk=6, mask=mask)
    return ki.exact_token_attention(q, k, v, selected, mask=mask)


CALLS = {
    "blocks of a segment": by_blocks(16, 2), "blocks of four": by_blocks(4, 4), "routed": routed,
    "clustered": clustered, "by groups": by_groups_of_blocks, "exact tokens": exact_tokens,
}  # fmt: skip
EVERYWHERE = ("routed",)


def within_documents(mask_ids):
    place = torch.arange(mask_ids.shape[1])
    new = torch.nn.functional.pad(mask_ids[:, 1:] != mask_ids[:, :-1], (1, 0), value=True)
    return place - torch.where(new, place, 0).cummax(-1).values


@pytest.mark.thorough_if(when=lambda call: call not in EVERYWHERE)
@pytest.mark.parametrize("call", CALLS)
def test_a_selection_has_the_bits_that_it_has_alone(call):
    """Output and the gradients of q, k and v, packed with others or not; and of the last queries over all keys."""
    *qkv, upstream = heads()
    run, within = CALLS[call], within_documents(DOCUMENTS)
    packed = with_gradients(
        lambda *x: run(*x, ki.MaskContract(doc_ids=DOCUMENTS), within), qkv, upstream
    )  # fmt: skip
    for b, first, end in PARTS:
        part = slice(b, b + 1), slice(first, end)
        place = torch.arange(end - first)[None]
        alone = with_gradients(
            lambda *x, p=place: run(*x, ki.MaskContract(), p), [x[part] for x in qkv], upstream[part]
        )
        for name, one, other in zip(("out", "dq", "dk", "dv"), alone, packed, strict=True):
            assert torch.equal(one, other[part]), (name, b, first)
    last = (q := qkv[0][:1, 30:41]), *(x[:1, 19:41] for x in qkv[1:])
    found = with_gradients(
        lambda *x: run(*x, ki.MaskContract(q_offset=11), torch.arange(11, 22)[None]), last, torch.ones_like(q)
    )
    assert torch.equal(found[0], packed[0][:1, 30:41])


@pytest.mark.parametrize("call", ["attention", "routed"])
def test_a_path_of_a_tree_is_a_document(call):
    """Two answers to one prompt, forward and the gradient of what is theirs alone."""
    ends = torch.tensor([[45] * 20 + [33] * 13 + [45] * 12])
    *qkv, upstream = (x[:1] for x in heads())

    def run(q, k, v, mask):
        return ki.attention(q, k, v, mask) if call == "attention" else routed(q, k, v, mask, None)

    tree = with_gradients(lambda *x: run(*x, ki.MaskContract(subtree_end=ends)), qkv, upstream)
    for own in (slice(20, 33), slice(33, 45)):
        path = torch.cat((torch.arange(20), torch.arange(45)[own]))
        alone = with_gradients(lambda *x: run(*x, ki.MaskContract()), [x[:, path] for x in qkv], upstream[:, path])
        for one, other in zip(alone, tree, strict=True):
            assert torch.equal(one[:, 20:], other[:, own])
        assert torch.equal(alone[0][:, :20], tree[0][:, :20])


def mixer(dtype=torch.float32):
    torch.manual_seed(0)
    layer = Mamba2(16, 1, 8, state=8)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return layer.to(dtype)


def test_a_state_goes_on_in_inference_mode_with_the_bits_of_training():
    """As ``generate`` decodes: a state is no inference tensor, and what was made of one is saved for no gradient."""
    layer, x = mixer(), torch.randn(1, 12, 16)
    with ki.numerics("invariant"):
        expected = layer(x, ki.MaskContract())[0].detach()
        with torch.inference_mode():
            state = layer.new_state(1)
            found = torch.cat([layer(part, cache=state)[0] for part in x.split((7, 1, 4), 1)], 1)
    assert torch.equal(found, expected)


@pytest.mark.thorough
def test_chunks_of_a_scan_count_from_the_document():
    layer, x = mixer(), torch.randn(1, 80, 16)
    documents = torch.tensor([[0] * 9 + [1] * 70 + [2]])

    def run(x, mask):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, mask)[0]
        return y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))

    with ki.numerics("invariant"):
        packed = run(x, ki.MaskContract(doc_ids=documents))
        alone = run(x[:, 9:79], ki.MaskContract())
        for one, other in zip(alone, packed, strict=True):
            assert torch.equal(one, other[:, 9:79])
        state, found = layer.new_state(1), []
        with torch.no_grad():
            for first, end in ((0, 62), (62, 63), (63, 64), (64, 65), (65, 70)):
                found.append(layer(x[:, 9 + first : 9 + end], None, None, state)[0])
    assert torch.equal(torch.cat(found, 1), alone[0])
    ordinary = layer(x, ki.MaskContract(doc_ids=documents))[0]
    torch.testing.assert_close(packed[0], ordinary)


@pytest.mark.thorough
def test_documents_that_fill_their_chunks_are_not_moved(monkeypatch):
    from kernel_index.nn import device_scan

    layer, x = mixer(), torch.randn(1, 192, 16)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0] * 64 + [1] * 128]))
    with ki.numerics("invariant"):
        alone = layer(x[:, 64:], ki.MaskContract())[0]
        with monkeypatch.context() as m:
            m.setattr(device_scan, "_rows_at", None)
            whole = layer(x, mask)[0]
        among = layer(
            torch.cat((x[:, :9], x[:, 64:]), 1), ki.MaskContract(doc_ids=torch.tensor([[0] * 9 + [1] * 128]))
        )[0]
    assert torch.equal(whole[:, 64:], alone)
    assert torch.equal(among[:, 9:], alone)


@pytest.mark.thorough
def test_rows_of_a_decoding_step_have_lengths_of_their_own():
    layer, x = mixer(), torch.randn(2, 12, 16)
    with ki.numerics("invariant"), torch.no_grad():
        alone = [layer(row[None], ki.MaskContract())[0][0] for row in x]
        state = layer.new_state(2)
        state.counts = torch.tensor([8, 3])
        first = layer(x[:, :8], None, None, state)[0]
        assert torch.equal(first[0], alone[0][:8])
        assert torch.equal(first[1, :3], alone[1][:3])
        state.counts = None
        after = layer(torch.stack((x[0, 8:12], x[1, 3:7])), None, None, state)[0]
    assert torch.equal(after[0], alone[0][8:12])
    assert torch.equal(after[1], alone[1][3:7])


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_experts_have_the_same_gradients_whoever_recomputes(activation):
    """The layer, the block around it, or none of them: a layer that keeps everything has no other function."""
    torch.manual_seed(0)
    layer = Experts(24, 16, experts=4, topk=2, shared=16, activation=activation)
    block, (x, g) = HybridBlock(24, mlp=layer), torch.randn(2, 1, 21, 24)
    found = []
    with ki.numerics("invariant"), ki.force("triton", "expert_mlp"):
        for layer.recompute, block.recompute in ((True, False), (False, False), (True, True), (False, True)):
            leaf = x.clone().requires_grad_()
            with ki.receipts() as log:
                out, _ = block(leaf, None)[1]
            found.append(torch.autograd.grad(out, (leaf, *block.parameters()), g, allow_unused=True))
            assert [r.ran for r in log if r.op == "expert_mlp"] == ["triton"]
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a is b is None or torch.equal(a, b)
