"""A sink while decoding, where the cases of the conformance test do not look."""

import pytest
import torch

import kernel_index as ki
from tests.kernels.attention.test_kvcache_decode import a_call


@pytest.mark.parametrize("backend", ["triton", "native", "reference"])
def test_a_sink_of_minus_infinity_is_none(backend):
    """Also for a query that sees no key: it gives 0."""
    call = a_call(k=None, v=None)
    sink = torch.tensor([-torch.inf, 0.5, -torch.inf, 1.0])
    out = ki.fa4_kvcache_decode(**call, sink=sink, backend=backend)
    plain = ki.fa4_kvcache_decode(**call, backend="reference")
    torch.testing.assert_close(out[:, :, ::2], plain[:, :, ::2], rtol=2e-5, atol=2e-6)
    assert not out[1].any()
