"""The same call for torch and for JAX, and the budget that its results must keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from kernel_index.proofs.errors import floor, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DOCS = np.array([7] * 13 + [4] * 9 + [7] * 12 + [-1] * 3 + [9] * 8)


def docs(tokens: int) -> np.ndarray:
    """Two rows: documents, one of which comes back, with padding; and one document."""
    ids = np.tile(DOCS, -(-tokens // len(DOCS)))[:tokens]
    return np.stack([ids, np.zeros_like(ids)])


def draw(seed: int, dtype: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DTYPES[dtype]) for s in shapes]


def to_jax(x: Tensor) -> jax.Array:
    wide = x.detach().to(torch.float32) if x.is_floating_point() else x
    return jnp.asarray(wide.numpy(), (x.dtype == torch.bfloat16 and jnp.bfloat16) or None)


def to_torch(x: Any) -> Tensor:
    x = np.asarray(x.astype(jnp.float32)) if x.dtype == jnp.bfloat16 else np.array(x)
    return torch.from_numpy(np.array(x))


def with_gradients(
    function: Any, inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output and gradients of a torch function, in another dtype where one is given."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def within_budget(
    actual: list[Any], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype, units: float
) -> None:
    """Error ≤ 2 × the error of the plain formula in the same dtype + rounding + ``units`` of float32."""
    for name, ours, theirs, exact in zip(("out", "dq", "dk", "dv", "d_sink"), actual, plain, truth, strict=False):
        budget = 2 * relative_error(theirs, exact) + floor(dtype) + units * torch.finfo(torch.float32).eps
        error = relative_error(to_torch(ours), exact)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
