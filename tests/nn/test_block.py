"""Blocks of any parts, on one stream or between four."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Attention, BlockBranch, HybridBlock, HyperConnectedBlocks, Mamba2, SquaredReLUMLP


def parts():
    torch.manual_seed(0)
    return {"mixer": Attention(16, 2, 1, 8), "mlp": SquaredReLUMLP(16, 32)}


def call(block, x, branch=None):
    return block(x, branch, ki.MaskContract(), ki.rope_tables(torch.arange(x.shape[1]), 8))


def test_a_block_without_parts_is_an_error():
    with pytest.raises(ValueError, match="mixer must be given where mlp is not"):
        HybridBlock(16)


@pytest.mark.parametrize("names", [("mixer",), ("mlp",), ("mixer", "mlp")])
def test_a_block_adds_the_branch_before_it_and_returns_its_own(names):
    block = HybridBlock(16, **{n: p for n, p in parts().items() if n in names})
    x, out, bias = torch.randn(1, 5, 16), torch.randn(1, 5, 16), torch.randn(16)
    stream, last = call(block, x, (out, bias))
    fresh, same = call(block, x + out + bias)
    torch.testing.assert_close(stream, fresh)
    torch.testing.assert_close(last[0], same[0])


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_stream_is_float32_or_the_models_own(fp32, bias):
    block = HybridBlock(16, mlp=SquaredReLUMLP(16, 32), fp32_residual=fp32).bfloat16()
    stream = torch.randn(1, 5, 16).bfloat16()
    stream, (out, _) = block(stream, (torch.randn(1, 5, 16).bfloat16(), torch.randn(16).bfloat16() if bias else None))
    assert stream.dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_hyper_connected_blocks_start_as_the_plain_model():
    blocks = [
        HybridBlock(16, **parts()),
        HybridBlock(16, mixer=Mamba2(16, 2, 8, state=4)),
        HybridBlock(16, mlp=SquaredReLUMLP(16, 32)),
    ]
    x = torch.randn(2, 6, 16)
    arguments = ki.MaskContract(), ki.rope_tables(torch.arange(6), 8)
    streams = HyperConnectedBlocks([BlockBranch(b) for b in blocks], separation=25.0)(x, *arguments)
    stream, branch = x, None
    for block in blocks:
        stream, branch = block(stream, branch, *arguments)
    out, bias = branch
    torch.testing.assert_close(streams, stream + out + (0 if bias is None else bias), rtol=1e-5, atol=1e-5)


def test_dropout_in_a_branch_between_streams():
    block = BlockBranch(HybridBlock(64, mlp=SquaredReLUMLP(64, 64), dropout=0.5))
    out, bias = block(torch.randn(1, 20, 64))
    assert bias is None
    assert 0.4 < (out == 0).float().mean() < 0.6
    assert (block.eval()(torch.randn(1, 20, 64))[0] != 0).all()


def test_recomputing_a_block_replays_its_dropout_masks():
    block = HybridBlock(16, **parts(), dropout=0.3)
    x = torch.randn(1, 6, 16, requires_grad=True)
    runs = []
    for block.recompute in (False, True):
        torch.manual_seed(5)
        stream, (out, _) = call(block, x, (torch.ones_like(x), None))
        torch.manual_seed(99)  # whatever is drawn between forward and backward
        runs.append([stream, out, *torch.autograd.grad((stream + out).square().sum(), [x, *block.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_block_between_streams_may_have_its_own_arguments():
    blocks = HyperConnectedBlocks([BlockBranch(HybridBlock(16, mixer=parts()["mixer"])) for _ in range(2)])
    x, tables = torch.randn(1, 6, 16), ki.rope_tables(torch.arange(6), 8)
    wide, narrow = ki.MaskContract(), ki.MaskContract(window=(1, 0))
    mixed = blocks.run(x, [((wide, tables), {}), ((narrow, tables), {})])
    assert not torch.allclose(mixed, blocks(x, wide, tables))
    assert torch.equal(blocks.run(x, [((narrow, tables), {})] * 2), blocks(x, narrow, tables))
