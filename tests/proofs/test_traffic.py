"""The traffic counter: exact on kernels whose bytes are known, and it sees waste, atomics and ops between launches."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.testing import Maker, suites
from kernel_index.core.triton import launch
from kernel_index.proofs.ratios import both_ways
from kernel_index.proofs.traffic import counted
from tests.proofs import kernels

needs_interpreter = pytest.mark.skipif(not launch.interpreting(), reason="counts in Triton's interpreter, on a CPU")
pytestmark = needs_interpreter


def run(kernel, size=1000, dtype=torch.float32, out=1000):
    x, y = torch.ones(size, dtype=dtype), torch.zeros(out, dtype=dtype)
    with counted() as traffic:
        kernel[(8,)](x, y, size, BLOCK=128)
    return traffic


def test_a_copy_is_counted_to_the_byte():
    traffic = run(kernels.copy_kernel)
    assert traffic.lanes == 2 * 4000
    assert traffic.sectors == 2 * 4000
    assert (traffic.launches, traffic.others, traffic.atomics) == (1, 0, 0)
    assert run(kernels.copy_kernel, dtype=torch.bfloat16).lanes == 2 * 2000


def test_a_strided_read_moves_whole_sectors():
    traffic = run(kernels.wasteful_kernel, size=1024, out=512)
    assert traffic.lanes == 2 * 2048
    assert traffic.sectors == 4096 + 2048


def test_atomics_are_seen():
    assert run(kernels.atomic_kernel, out=1).atomics == 8


def test_ops_between_launches_count_their_tensors():
    x = torch.ones(64, 100)
    with counted() as traffic:
        x.t().view(100, 64).sum(0)
    assert [c.name for c in traffic.counts] == ["aten.sum"]
    assert traffic.sectors == 4 * (6400 + 64)


def test_nothing_is_counted_after_the_block():
    traffic = run(kernels.copy_kernel)
    before = traffic.lanes
    kernels.copy_kernel[(8,)](torch.ones(1000), torch.zeros(1000), 1000, BLOCK=128)
    assert traffic.lanes == before
    with pytest.raises(RuntimeError, match="stop"), counted():
        raise RuntimeError("stop")
    assert run(kernels.copy_kernel).lanes == before


@pytest.mark.parametrize(
    "op", ["fused_relu_squared", "fused_gated_activation", "fused_rope_qk", "fused_residual_add_rms_norm"]
)
def test_our_kernels_move_what_they_must(op):
    """``prove traffic`` at full width does the same for every kernel; here at 132 rows."""
    suite = next(s for s in suites() if s.op == op)
    call = suite.real(Maker(torch.bfloat16), 132)
    directions = both_ways(suite.function, call, [n for n in suite.differentiable if n in call])
    for traffic, compulsory, most in zip(directions, suite.compulsory(call), (1, 2), strict=True):
        assert 1 <= traffic.launches <= most, "backward, one small reduction more"
        assert traffic.others == 0
        assert traffic.atomics == 0
        assert traffic.sectors <= 1.07 * compulsory, "at so few rows the partial sums still weigh"


def test_the_halves_of_a_projection_are_read_where_they_are():
    gate, up = torch.randn(132, 2 * 4096).bfloat16().chunk(2, -1)
    directions = both_ways(ki.fused_gated_activation, {"gate": gate, "up": up}, ["gate", "up"])
    for traffic, tensors in zip(directions, (3, 5), strict=True):
        assert (traffic.launches, traffic.others) == (1, 0)
        assert traffic.sectors == tensors * gate.numel() * 2


def test_a_chunk_of_logits_is_read_once_forward_and_a_slice_read_and_written_once_backward():
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import slices, triton

    z, targets = torch.randn(6, 5000).bfloat16(), torch.arange(6)
    logits, constants = z.numel() * z.element_size(), (30.0, 1.0, 0.1, 1e-4)
    rows, (losses, *statistics) = torch.ones(6), torch.empty(4, 6)
    with counted() as traffic:
        triton.losses(z, targets, (losses, *statistics), 5000, constants, slices.Layout(5000, 5000))
    assert traffic.launches == 1
    assert traffic.sectors <= 1.05 * logits
    with counted() as traffic:
        triton.gradient(z, targets, rows, statistics, 0, 5000, constants)
    assert traffic.launches == 1
    assert traffic.sectors <= 1.05 * 2 * logits


def test_an_output_that_is_not_used_costs_nothing_in_backward():
    residual, delta, weight = (torch.randn(n, 64).requires_grad_() for n in (32, 32, 1))
    stream, _ = ki.fused_residual_add_rms_norm(residual, delta, weight[0], backend="triton")
    with counted() as traffic:
        torch.autograd.grad(stream, [residual, delta], torch.ones_like(stream))
    assert traffic.launches == 0, "the gradient passes through the addition"
