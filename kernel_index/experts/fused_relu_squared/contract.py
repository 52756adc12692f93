"""Who may call ``fused_relu_squared``, and who may answer."""

from torch import Tensor

from kernel_index import checks, gpu, inductor

triton_why_not = gpu.why_not
triton_not_worth = gpu.not_worth
inductor_why_not = inductor.why_not
inductor_not_worth = inductor.not_worth


def check(x: Tensor) -> None:
    checks.is_floating("x", x)
