"""Activations and their slopes as device functions, in float32."""

import triton.language as tl

from kernel_index.core.triton.jit import jit


@jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and act'(x) for float32 x; what a caller does not use is not computed."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # √½
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1/√(2π)
    elif KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # √(8/π); (1 + tanh(z)) / 2 = sigmoid(2·z)
        value = x * s
        slope = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        value = tl.where(x <= 0, 0.0, x)  # not maximum(x, 0), which would swallow a NaN
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        value = tl.where(x <= 0, 0.0, x * x)
        slope = 2.0 * x
    return value, slope
