"""``inductor.sum_rows``, by which the gradients of weights and biases are reduced."""

import pytest
import torch

from kernel_index.core.inductor import Region, sum_rows


def total(values):
    return sum_rows(values.double() if values.dtype == torch.int64 else values)


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 31, 32, 33, 1000])
@pytest.mark.parametrize("rest", [(), (5,), (3, 4, 16)], ids=str)
def test_every_row_is_counted_once(rows, rest):
    values = torch.arange(rows * max(1, torch.Size(rest).numel())).view(rows, *rest)
    assert torch.equal(total(values), values.double().sum(0))


def test_one_compilation_for_all_row_counts():
    region, graphs = Region(total, values=(0,)), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for rows in (300, 2, 7, 15, 16, 17, 32):
        values = torch.arange(rows * 40).view(rows, 40)
        assert torch.equal(region(values), values.double().sum(0))
    assert graphs["unique_graphs"] == before + 1


def test_threads_do_not_change_a_bit():
    region, values, threads = Region(total, values=(0,)), torch.randn(999, 64), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(region(values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_long_sums_round_little():
    """A million tenths: one running sum in float32 is off by 1 %."""
    values = torch.full((1 << 20, 1), 0.1)
    assert abs(float(Region(total, values=(0,))(values)) / (values.double().sum().item()) - 1) < 1e-4
