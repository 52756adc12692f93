"""The exhaustive router in C++ ranks scores as ``topk_keys`` does, also those that are not numbers."""

import pytest
import torch

from kernel_index.core import native
from kernel_index.routing.block_router.native import SOURCE

pytestmark = pytest.mark.skipif(native.why_not(torch.zeros(1)) is not None, reason="native kernels do not run here")


def selected(means, topk):
    """The blocks of one query (1, 1) whose current block is the last one."""
    blocks = len(means)
    q, indices = torch.ones(1, 1, 1, 2), torch.empty(1, 1, 1, topk, dtype=torch.int32)
    first, current = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), blocks - 1, dtype=torch.int32)
    sizes = (1, 1, 1, 1, 1, 2, blocks, topk, 1, 1)
    native.call(SOURCE, "route_float32", sizes, (), first, current, q, means, indices)
    return indices.flatten().tolist()


@pytest.mark.parametrize("topk", [2, 3, 4, 5, 12, 60])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_either_sign_ranks_above_infinity(sign, topk):
    """∞ − ∞ is a NaN whose sign bit is set on x86."""
    blocks, nans, infinite = 200, [20, 21, 90, 150], 5
    means = torch.zeros(blocks, 2)
    means[:, 0] = torch.arange(blocks)
    means[infinite, 0] = torch.inf
    means[nans] = torch.tensor([torch.inf, -torch.inf]) if sign < 0 else torch.nan
    best = [*nans, infinite, *(j for j in range(blocks - 2, 0, -1) if j not in (*nans, infinite))][: topk - 1]
    assert selected(means, topk) == sorted([*best, blocks - 1])
