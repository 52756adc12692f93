"""The short causal convolution in front of a state-space scan: each channel by itself, over a few tokens."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import ON_A_GPU
from kernel_index.kernels.state_space.causal_conv1d import contract
from kernel_index.kernels.state_space.causal_conv1d.contract import ConvActivation
from kernel_index.kernels.state_space.causal_conv1d.reference import causal_conv1d_reference
from kernel_index.kernels.state_space.causal_conv1d.torch_op import causal_conv1d_triton

CausalConv1dBackend = Literal["auto", "triton", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, causal_conv1d_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend("reference", always, causal_conv1d_reference),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: ConvActivation | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    backend: CausalConv1dBackend = "auto",
) -> Tensor:
    """A depthwise causal convolution over the last W tokens, with its activation, in one pass over memory.

    ``y[t] = act(bias + Σ_j weight[:, j] · x[t − (W − 1) + j])``, where the sum is over inputs of t's own segment, and
    act is ``silu(z) = z · sigmoid(z)`` or nothing.  Computed in float32 at least and rounded once.  Backward makes z
    again from x; nothing else is kept.  Gradients of weight and bias are added up in a fixed order.  A token has no
    effect on another segment or on earlier tokens, not even as NaN or infinity.

    Args:
        x: [B, T, C], any floating dtype; T is at least 1.
        weight: [C, W], any floating dtype; the last tap is of the token itself.
        bias: [C], any floating dtype; None for none.
        activation: ``"silu"`` or None.
        segments: int [B or 1, T], not decreasing: the document of each token; None for one.
        state: [B, W − 1, C], the inputs before the first token, in its segment; None for zeros.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device is wrong, or the activation is none of the above.
        Ineligible: the named backend cannot run this call.

    Source: Dao and Gu, "Transformers are SSMs", 2024; weight is laid out as in the package ``causal_conv1d``.

    >>> import torch, kernel_index as ki
    >>> x, weight = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[0.5, 1.0]])
    >>> ki.causal_conv1d(x, weight).flatten()
    tensor([1.0000, 2.5000, 5.0000])
    >>> ki.causal_conv1d(x, weight, segments=torch.tensor([[0, 1, 1]])).flatten()
    tensor([1., 2., 5.])
    """
    call = contract.check(x, weight, bias, activation, segments, state)
    return choose("causal_conv1d", BACKENDS, backend, call).run(call)
