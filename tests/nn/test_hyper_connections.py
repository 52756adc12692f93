"""Residual streams around any block."""

import pytest
import torch
from torch import nn

import kernel_index as ki
from kernel_index.nn import HyperConnectedBlocks, HyperConnections, SquaredReLUMLP


class WithBias(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear, self.bias = nn.Linear(dim, dim, bias=False), nn.Parameter(torch.randn(dim))

    def forward(self, x, gain=1.0):
        return gain * self.linear(x), self.bias


def single_stream(blocks, x):
    for block in blocks:
        out = block(x)
        out, bias = out if isinstance(out, tuple) else (out, None)
        x = x + (out if bias is None else out + bias)
    return x


def blocks(count=5, dim=8):
    kinds = (lambda: nn.Linear(dim, dim), lambda: SquaredReLUMLP(dim, 16), lambda: WithBias(dim))
    return [kinds[i % 3]() for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_single_stream_model_to_the_last_bit(dtype):
    own = blocks()
    model = HyperConnectedBlocks(own, separation=25.0)
    for block in own:
        block.to(dtype)
    x = torch.randn(2, 7, 8, dtype=dtype)
    assert torch.equal(model(x), single_stream(own, x))


@pytest.mark.parametrize("separation", [0.0, 2.0, 8.0])
def test_starts_as_the_single_stream_model_in_exact_arithmetic(separation):
    own = blocks()
    model = HyperConnectedBlocks(own, separation=separation).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), single_stream(own, x), rtol=1e-13, atol=1e-13)


def test_h_res_starts_near_the_identity_and_doubly_stochastic():
    h_res = HyperConnections(nn.Identity()).h_res()
    torch.testing.assert_close(h_res, torch.eye(4), rtol=0, atol=1.1e-3)
    assert (h_res > 0).all()
    for dim in (0, 1):
        torch.testing.assert_close(h_res.sum(dim), torch.ones(4))


def test_every_parameter_learns_and_the_streams_part():
    """The first step treats all streams alike; what each layer reads differs, so that the second does not."""
    own = blocks(count=4)
    model = HyperConnectedBlocks(own)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in model.layers[:-1]:  # the last layer's streams are only averaged: its columns all count the same
        for parameter in (layer.h_pre, layer.h_post, layer.h_res_logits):
            assert parameter.grad.abs().max() > 0
    assert model.layers[0].h_post.unique().numel() > 1


def test_one_launch_between_two_blocks():
    model = HyperConnectedBlocks(blocks(count=3))
    with ki.receipts() as log:
        model(torch.randn(1, 3, 8))
    ops = [r.op for r in log if r.op.startswith("mhc")]
    assert ops == ["mhc_branch_input", *3 * ["mhc_merge_and_branch_input"]], "the last one reads the mean"
    assert [r.op for r in log].count("sinkhorn") == 1, "for all layers together"


def test_layer_by_layer_is_the_same_model():
    model = HyperConnectedBlocks(blocks(count=3), separation=1.0)
    x = torch.randn(2, 3, 8)
    hidden = x.unsqueeze(-2).repeat_interleave(4, -2)
    for layer in model.layers:
        hidden = layer(hidden)
    torch.testing.assert_close(model(x), hidden.mean(-2))


def test_arguments_reach_the_block():
    block = WithBias(8)
    layer = HyperConnections(block)
    hidden = torch.randn(1, 2, 4, 8)
    expected = hidden + (2.0 * block.linear(hidden[:, :, 0]) + block.bias).unsqueeze(2)
    torch.testing.assert_close(layer(hidden, gain=2.0), expected, rtol=0, atol=0.02)
    assert not torch.allclose(layer(hidden, gain=3.0), expected, rtol=0, atol=0.02)


def test_other_stream_counts():
    model = HyperConnectedBlocks(blocks(count=2), streams=3)
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_no_blocks_change_nothing():
    x = torch.randn(1, 2, 8)
    assert HyperConnectedBlocks([])(x) is x
