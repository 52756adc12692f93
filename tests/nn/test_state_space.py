"""The mixer: nothing crosses from document to document, and decoding continues the prefill."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Mamba2
from tests.nn.close import assert_as_exact_as_float32


def mixer(**changes):
    torch.manual_seed(0)
    return Mamba2(12, heads=4, head_dim=3, **{"state": 5, "groups": 2, "chunk": 4, **changes})


def test_nothing_leaks_from_document_to_document():
    """Neither through the convolution nor through the scan: not one bit, forward and backward."""
    layer, ids = mixer(), torch.tensor([[3, 3, 3, 1, 1, 1, 1, 1, 3, 3, 3]])
    mask = ki.MaskContract(doc_ids=ids)
    x = torch.randn(1, 11, 12)
    changed = x.clone()
    changed[:, :3] = 100 * torch.randn(1, 3, 12)

    def run(x):
        x = x.clone().requires_grad_()
        y = layer(x, mask)[0]
        return y.detach(), torch.autograd.grad(y[:, 3:8].square().sum(), x)[0]

    (y, g), (y2, _) = run(x), run(changed)
    assert torch.equal(y[:, 3:], y2[:, 3:])
    assert not torch.equal(y[:, :3], y2[:, :3])
    assert not g[:, :3].any()
    assert not g[:, 8:].any()
    assert g[:, 3:8].abs().min() > 0


@pytest.mark.parametrize("chunk", [4, 64])
def test_a_long_document_leaks_nothing_into_the_next(chunk):
    """Sums that ran on from document to document would round differently."""
    layer, ids = mixer(chunk=chunk), (torch.arange(256) >= 100).long()[None]
    x = torch.randn(1, 256, 12)
    changed = torch.cat([3 * torch.randn(1, 100, 12), x[:, 100:]], 1)
    ours, theirs = (layer(t, ki.MaskContract(doc_ids=ids))[0][:, 100:] for t in (x, changed))
    assert torch.equal(ours, theirs)


def test_packed_documents_equal_each_alone():
    layer = mixer().double()
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    packed = layer(x, ki.MaskContract(doc_ids=torch.tensor([0] * 5 + [1] * 6)))[0]
    alone = torch.cat([layer(x[:, :5])[0], layer(x[:, 5:])[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


def test_it_does_not_look_ahead():
    layer, x = mixer(), torch.randn(1, 9, 12)
    changed = x.clone()
    changed[:, 5] += 1
    a, b = layer(x)[0], layer(changed)[0]
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any()


@pytest.mark.parametrize("steps", [(9,), (4, 1, 1, 3), (1,) * 9])
def test_decoding_continues_the_prefill(steps):
    layer, x = mixer(), torch.randn(2, 9, 12)
    whole, state, at = layer(x)[0], layer.new_state(2), 0
    with torch.no_grad():
        for n in steps:
            y = layer(x[:, at : at + n], cache=state)[0]
            assert_as_exact_as_float32(y, whole[:, at : at + n], layer.double()(x.double())[0][:, at : at + n])
            layer.float()
            at += n


def test_a_step_of_decoding_has_its_gradient_and_its_state_has_no_graph():
    layer, x = mixer(), torch.randn(1, 5, 12)
    state = layer.new_state(1)
    with torch.no_grad():
        layer(x[:, :4], cache=state)
    upstream = torch.randn(1, 1, 12)
    ours = torch.autograd.grad(layer(x[:, 4:], cache=state)[0], layer.out.weight, upstream)[0]
    expected = torch.autograd.grad(layer(x)[0][:, 4:], layer.out.weight, upstream)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    layer(x[:, 4:], cache=state)[0].sum().backward()
    assert not state.conv.requires_grad
    assert not state.scan.requires_grad


def test_a_state_keeps_nothing_of_the_prompt_and_outlives_the_mode_of_a_step():
    layer, x = mixer(), torch.randn(1, 100, 12)
    state = layer.new_state(1)
    with torch.inference_mode():
        layer(x, cache=state)
    for kept, fresh in zip((state.conv, state.scan), (layer.new_state(1).conv, layer.new_state(1).scan), strict=True):
        assert kept.untyped_storage().nbytes() == fresh.untyped_storage().nbytes()
    layer(x[:, :1], cache=state)[0].sum().backward()
    assert layer.proj.weight.grad.any()


def test_padding_behind_a_shorter_prompt_leaves_no_trace():
    layer, x = mixer(), torch.randn(2, 6, 12)
    x[1, 2:] = 1e3  # padding of the second row
    batch, alone = layer.new_state(2), layer.new_state(1)
    batch.counts = torch.tensor([6, 2])
    with torch.no_grad():
        layer(x, cache=batch)
        layer(x[1:, :2], cache=alone)
    torch.testing.assert_close(batch.scan[1:], alone.scan, rtol=1e-5, atol=1e-6)
    # A product's bits may depend on how many rows it has, so the inputs kept are close, and those of no token zero.
    torch.testing.assert_close(batch.conv[1:], alone.conv, rtol=1e-5, atol=1e-6)
    assert not batch.conv[1, 0].any()


def test_groups_must_divide_heads():
    with pytest.raises(ValueError, match=r"heads must be a multiple of groups \(3\), got 4"):
        mixer(groups=3)


TREE = ki.pack_tree([-1, 0, 0], [5, 3, 4])
MASKS = {
    "one document": None,
    "documents": ki.MaskContract(doc_ids=torch.tensor([0] * 5 + [1] * 7)),
    "tree": ki.MaskContract(subtree_end=TREE.subtree_end),
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_triton_kernels_give_the_layer_of_the_references(mask):
    layer, x = mixer(), torch.randn(2, 12, 12)
    upstream = torch.randn(2, 12, 12)

    def run(backend):
        with ki.force(backend), ki.receipts() as log:
            y = layer(x, MASKS[mask])[0]
            gradients = torch.autograd.grad(y, list(layer.parameters()), upstream)
        return {r.op for r in log if r.ran == backend}, (y, *gradients)

    ops, found = run("triton")
    assert {"causal_conv1d", "ssd_scan", "gated_rms_norm"} <= ops
    for a, b in zip(found, run("reference")[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_decoding_with_the_triton_kernels_continues_the_prefill():
    layer, x = mixer(), torch.randn(2, 9, 12)
    whole, state = layer(x)[0], layer.new_state(2)
    with torch.no_grad(), ki.force("triton"):
        for piece in x.split((4, 1, 1, 3), 1):
            y = layer(piece, cache=state)[0]
            torch.testing.assert_close(y, whole[:, : y.shape[1]], rtol=1e-4, atol=1e-5)
            whole = whole[:, y.shape[1] :]


@pytest.mark.parametrize("tokens", [10, 12])
def test_a_tree_of_another_length_is_refused(tokens):
    mask = ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0, -1], [3, 2, 2, 4]).subtree_end)
    layer = Mamba2(8, heads=2, head_dim=4, state=3)
    with pytest.raises(ValueError, match="must be 11"):
        layer(torch.randn(2, tokens, 8), mask)
