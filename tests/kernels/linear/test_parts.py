"""How many parts a weight's gradient is summed in: a rule of sizes, which needs no GPU."""

import pytest

pytest.importorskip("triton")

from kernel_index.core.triton.hopper_products import MOST, _parts_of


def test_no_tokens_have_one_part():
    """A batch without rows has a gradient of zeros, and no step of a sum."""
    assert _parts_of(16, 0, 8) == 1


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4096, 32768])
def test_no_part_is_empty(tokens):
    parts = _parts_of(512, tokens, 512)
    steps = -(-tokens // 64)
    assert 1 <= parts <= min(MOST, steps)
    assert (parts - 1) * -(-steps // parts) < steps
