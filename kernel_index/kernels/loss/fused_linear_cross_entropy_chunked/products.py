"""The matrix products of a pass by chunks of tokens: logits in, gradients of hidden, weight and bias out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import device_products, products, stable

WEIGHT_TILE = 8192
"""Rows of a low-precision weight gradient formed at a time before they are added to the float32 sum."""

BLOCK_BYTES = 1 << 20
"""Float32 bytes of the rows that a plain pass works on at a time: its temporaries are of this size, not the chunk's."""


def exact_dtype(hidden: Tensor) -> torch.dtype:
    """Of losses, statistics and sums."""
    return torch.promote_types(hidden.dtype, torch.float32)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(hidden, weight.T) if bias is None else torch.addmm(bias, hidden, weight.T)


def block_rows(device: torch.device, columns: int) -> int:
    return max(1, (BLOCK_BYTES if device.type == "cpu" else 256 * BLOCK_BYTES) // (4 * max(1, columns)))


def by_blocks(function: Callable[..., Any], z: Tensor, *vectors: Tensor | None) -> list[Any]:
    """A plain pass over blocks of rows, so that its temporaries stay small."""
    rows = block_rows(z.device, z.shape[1])
    blocks = z.split(rows)
    split = ([None] * len(blocks) if v is None else v.split(rows) for v in vectors)
    return [function(*block) for block in zip(blocks, *split, strict=True)]


def all_reduce(value: Tensor, how: str, group: str) -> Tensor:
    """``value`` combined over the process group of that name."""
    from torch.distributed import _functional_collectives as collectives

    name: Any = group
    return collectives.wait_tensor(collectives.all_reduce(value, how, name))


class Products(NamedTuple):
    """The products of a pass, and a sum over tokens."""

    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    d_hidden: Callable[[Tensor, Tensor], Tensor]  # gradients of logits · weight
    add_outer: Callable[[Tensor, Tensor, Tensor], None]  # total += gradients of logitsᵀ · hidden
    add_rows: Callable[[Tensor, Tensor], None]  # total += the sum of the gradients of logits over tokens


def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    chunk: int,
    classes: int,
    group: str,
    factor: Tensor | None,
    to_gradient: Callable[[slice, Tensor], None],
    by: Products,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, times ``factor`` if there is one, from chunks of tokens.

    ``to_gradient(at, z)`` overwrites the logits z of the tokens ``at`` by their gradient; only the first ``classes``
    rows of weight have logits.  Sums over tokens, and over the processes of ``group``, are float32 at least.
    """
    exact = exact_dtype(hidden)
    d_hidden, d_weight, d_bias = empty_gradients(hidden, weight, [needs[0], False, needs[2]])
    if group:  # the sum over all classes is rounded only when it is complete
        d_hidden = d_hidden.to(exact)
    weight_sum = torch.zeros_like(weight, dtype=exact) if needs[1] else d_weight
    bias_sum = torch.zeros_like(d_bias, dtype=exact) if needs[2] else d_bias
    used, used_bias = weight[:classes], None if bias is None else bias[:classes]
    for start in range(0, hidden.shape[0], chunk):
        at = slice(start, start + chunk)
        z = by.logits(hidden[at], used, used_bias)
        to_gradient(at, z)
        if needs[0]:
            found = by.d_hidden(z, used)
            d_hidden[at] = found if factor is None else found.to(exact) * factor
        if needs[1]:
            by.add_outer(weight_sum[:classes], z, hidden[at])
        if needs[2]:
            by.add_rows(bias_sum[:classes], z)
        del z  # before the next chunk is allocated
    sums = (weight_sum, bias_sum) if factor is None else (weight_sum * factor, bias_sum * factor)
    d_weight, d_bias = (total.to(weight.dtype) for total in sums)
    if group and needs[0]:
        d_hidden = all_reduce(d_hidden, "sum", group)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _add_outer(total: Tensor, z: Tensor, hidden: Tensor) -> None:
    """total += zᵀ·hidden, summed in total's dtype whatever the factors' own."""
    if z.dtype == total.dtype:
        total.addmm_(z.T, hidden)
        return
    if z.is_cuda:  # the product's own accumulator takes part in the sum: no rounding, no tensor between
        torch.addmm(total, z.T, hidden, out_dtype=total.dtype, out=total)
        return
    for start in range(0, total.shape[0], WEIGHT_TILE):
        at = slice(start, start + WEIGHT_TILE)
        if z.dtype == torch.float16:  # a sum over tokens may pass 65504 before it is scaled
            total[at].addmm_(z[:, at].T.to(total.dtype), hidden.to(total.dtype))
        else:
            total[at] += torch.mm(z[:, at].T, hidden)


def _add_rows(total: Tensor, z: Tensor) -> None:
    for block in z.split(block_rows(z.device, z.shape[1])):
        total += block.sum(0, dtype=total.dtype)


PYTORCH = Products(logits_of, torch.mm, _add_outer, _add_rows)


def _of_rows(by: products.Products) -> Products:
    """Products whose rows do not depend on each other.  The logits are float32 whatever the dtype of hidden."""

    def add_outer(total: Tensor, z: Tensor, hidden: Tensor) -> None:
        total += by.d_weight(z.to(hidden.dtype), hidden)

    def add_rows(total: Tensor, z: Tensor) -> None:
        total += stable.column_sum(z)

    return Products(
        logits=lambda hidden, weight, bias: by.product(hidden, weight, bias, torch.float32),
        d_hidden=lambda z, weight: by.d_input(z.to(weight.dtype), weight),
        add_outer=add_outer,
        add_rows=add_rows,
    )


ROWS = {"native": _of_rows(products.NATIVE), "triton": _of_rows(device_products.TRITON)}


def by_name(passes: str) -> tuple[Products, Any]:
    """The products of a backend's passes, and the functions and sums of its formulas."""
    return (ROWS[passes], stable) if passes in ROWS else (PYTORCH, stable.PYTORCH)


def empty_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias; one that is not wanted is empty: an op's outputs have a fixed number."""
    nothing = (0,)
    return (
        hidden.new_empty(hidden.shape if needs[0] else nothing),
        weight.new_empty(weight.shape if needs[1] else nothing),
        weight.new_empty((weight.shape[0],) if needs[2] else nothing),
    )


def refuse_create_graph() -> None:
    """Grad mode is on in a backward only under create_graph=True, which would get gradients without a graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the chunked linear cross-entropy has no double backward: create_graph=True needs backend='reference'"
        )
