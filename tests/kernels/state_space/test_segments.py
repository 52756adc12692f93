"""Documents of the convolution and the scan: numbers that never decrease; one that comes back is refused."""

import pytest
import torch

import kernel_index as ki

x, dt, a = torch.randn(2, 6, 2, 4), torch.rand(2, 6, 2), -torch.rand(2)
b = torch.randn(2, 6, 1, 4)


@pytest.mark.parametrize("function", ["ssd_scan", "causal_conv1d"])
def test_a_number_that_comes_back_is_refused(function):
    def call(segments):
        if function == "ssd_scan":
            return ki.ssd_scan(x, dt, a, b, b, segments=segments)
        return ki.causal_conv1d(x.flatten(2), torch.randn(8, 3), segments=segments)

    call(torch.tensor([[0, 0, 3, 3, 3, 7], [-1, -1, 2, 2, 2, 2]]))
    with pytest.raises(ValueError, match=r"segments must not decrease along a row, got 0 after 1 at \[1, 4\]"):
        call(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]))
