"""The recurrence of Mamba-2, a state-space model with one decay for each head and token, in chunks."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.numerics import Recipe
from kernel_index.kernels.state_space.ssd_scan import contract
from kernel_index.kernels.state_space.ssd_scan.reference import ssd_scan_reference
from kernel_index.kernels.state_space.ssd_scan.torch_op import ssd_scan_triton

SCAN = Recipe(
    "scan on a GPU 1: chunks of a size that the dtype decides, from the row's start; decays as float64 sums of their "
    "own terms; products of tensor cores in the dtype of x, one float32 accumulator each; states in float32 from chunk "
    "to chunk; one rounding"
)

SSDScanBackend = Literal["auto", "triton", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, ssd_scan_triton, contract.triton_not_worth, invariant=SCAN),
    Backend("reference", always, ssd_scan_reference),
)


class Scanned(NamedTuple):
    """The outputs of a scan [B, T, H, P], and the state after the last token [B, H, P, N].

    >>> import torch, kernel_index as ki
    >>> one = torch.ones(1, 1, 1, 1)
    >>> ki.ssd_scan(one, one[..., 0], -torch.ones(1), one, one).state.shape
    torch.Size([1, 1, 1, 1])
    """

    y: Tensor
    state: Tensor


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
    backend: SSDScanBackend = "auto",
) -> Scanned:
    """The recurrence of Mamba-2 over the tokens of each row, as products of matrices over chunks of tokens.

    Head by head, with a state h [P, N] and the step ``dt_t``, which is ``softplus(dt_t + dt_bias)`` with
    ``dt_softplus``::

        h_t = exp(dt_t · a) · h_{t−1} + dt_t · x_t ⊗ b_t
        y_t = h_t · c_t + d · x_t

    Inside a chunk ``y_t = Σ_{s ≤ t} exp(Σ_{s<r≤t} dt_r · a) · (c_t · b_s) · dt_s · x_s``.  Sums of decays are made of
    their own terms, so what decayed earlier costs no digits, and no exponent is positive.  Sums and states are float32
    (float64 if x is); ``triton`` multiplies in x's dtype, as tensor cores do, and ``reference`` in float32.

    Where ``segments`` changes, h starts from zero.  A token has no effect on another segment or on earlier tokens, not
    even as NaN or infinity.  A step of 0 (with ``dt_softplus``: a dt of −inf) leaves the state as it is.

    Under ``numerics("invariant")`` a row's bits are its own.  Those of a segment are, too, where it begins at a
    multiple of 64 tokens; ``nn.Mamba2`` puts documents there.

    Args:
        x: [B, T, H, P], any floating dtype; T, H and P are at least 1.
        dt: steps [B, T, H], any floating dtype; after the softplus they are not negative.
        a: [H], not positive: the rate of decay.
        b: [B, T, G, N], x's dtype; G divides H, and the heads h of group ``h // (H/G)`` share its b and c.
        c: b's shape and dtype.
        d: [H], the weight of x in y; None for none.
        dt_bias: [H], added to dt; None for none.
        dt_softplus: whether the step is the softplus of dt + dt_bias.
        segments: int [B or 1, T], not decreasing: the document of each token; None for one.
        state: h before the first token, [B, H, P, N], in the first token's segment; None for zeros.
        chunk: tokens that ``reference`` multiplies together; ``triton`` takes 16 to 64, by dtype and GPU.  It changes
            speed and rounding alone.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``(y, state)``: y has x's shape and dtype; the state after the last token is [B, H, P, N], float32 at least.
        Both have gradients for x, dt, a, b, c, d, dt_bias and state.  Under autocast x, b and c are cast.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device is wrong, or chunk is less than 1.
        Ineligible: the named backend cannot run this call.

    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6; the arguments are those of ``mamba_ssm``.

    >>> import torch, kernel_index as ki
    >>> one, half = torch.ones(1, 3, 1, 1), torch.tensor([0.5]).log()
    >>> ki.ssd_scan(one, one[..., 0], half, one, one).y.flatten()
    tensor([1.0000, 1.5000, 1.7500])
    >>> ki.ssd_scan(one, one[..., 0], half, one, one, segments=torch.tensor([[0, 1, 1]])).y.flatten()
    tensor([1.0000, 1.0000, 1.5000])
    """
    call = contract.check(x, dt, a, b, c, d, dt_bias, dt_softplus, segments, state, chunk)
    return Scanned(*choose("ssd_scan", BACKENDS, backend, call).run(call))
