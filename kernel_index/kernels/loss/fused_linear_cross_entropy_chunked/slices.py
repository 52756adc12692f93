"""Logits by rows forward and by slices of the vocabulary backward: what the loss and ``token_stats`` do on a GPU.

A slice of logits has all tokens, so its rows of the weight's gradient are one product, summed in float32 inside it and
rounded once; only the gradient of the hidden states is summed over slices, in float32.

The logits of the first tokens wait for backward in the memory of the weight's gradient, which is not needed before: a
slice's rows of the gradient have as many elements as the slice's logits of C tokens, and replace them.  The others are
formed twice.  Where the caller lets more be held (``chunk_size``), they wait in memory of their own; where all tokens'
are, there is one slice, of three products.

Where half of the tokens or more are held, their hidden states have their gradient before the slices, while no other
one is summed: rounded it takes half of its sum's memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import device_products
from kernel_index.core.triton.launch import ceil_div
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import CHUNK_BYTES, rows_per_chunk
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import empty_gradients, logits_of

SLICE_BYTES = 64 << 20
"""Budget of a slice of logits; SLICE_PART of the hidden states' bytes, if that is more, so that products stay wide."""

SLICE_PART, FIRST_PART = 2.0, 1.25
"""The second where held tokens come first: on an H200, 8192 × 4096 and 128,256 classes, 1178 MiB in all for 1258."""

ALIGNED = 128
"""Classes of a slice are a multiple of this."""

BLOCKS = 1024
"""Classes of a slice that is held are a multiple of this, or a power of 2 below: whole blocks of the loss's kernel."""

WORTH = 8
"""The part of the tokens, one in so many, that is held at least: less saves less than it costs in launches."""

PADDED = 16
"""Columns of logits are a multiple of this where the weight has as many rows: tensor cores want aligned rows."""


class Layout(NamedTuple):
    """Logits [rows, ``width``] as slices of ``slice_width`` classes, each [rows, slice_width] and dense.

    Every class before a slice takes ``class_stride`` elements.
    """

    width: int
    slice_width: int
    class_stride: int = 0


class Products(NamedTuple):
    """The products of rows and of slices."""

    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    logits_into: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    add: Callable[[Tensor, Tensor, Tensor], None]  # total += a·b
    write: Callable[[Tensor, Tensor, Tensor], None]  # out = a·b


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b: the product's own accumulator takes part in the sum, so nothing is rounded between."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out=out)


PYTORCH = Products(logits_of, _logits_into, _add_product, _write_product)
ROWS = Products(
    lambda hidden, weight, bias: device_products.TRITON.product(hidden, weight, bias, torch.float32),
    lambda out, hidden, weight, bias: device_products.write_product(out, hidden, weight.T, bias),
    device_products.add_product,
    device_products.write_product,
)
"""Products whose rows do not depend on each other.  Slices have no part in a sum: it goes on in one accumulator."""


class Plan(NamedTuple):
    """How a call's logits are held: ``held`` tokens of them, in memory of ``room`` elements for each class.

    ``width`` columns: the classes, and some rows of padding.  ``step``: classes of a slice.  ``limit``: of how many
    tokens the forward pass may form logits at once beside the held ones, where the caller said it.  ``held_first``: the
    hidden states of held tokens have their gradient before the others'.
    """

    width: int
    step: int
    held: int = 0
    room: int = 0
    invariant: bool = False
    limit: int = 0
    held_first: bool = False

    @property
    def by(self) -> Products:
        return ROWS if self.invariant else PYTORCH

    def slices(self) -> list[slice]:
        return [slice(first, min(first + self.step, self.width)) for first in range(0, self.width, self.step)]

    def held_logits(self, memory: Tensor, at: slice) -> Tensor:
        """[held, classes of the slice], dense, at the begin of the slice's rows of the memory."""
        classes = at.stop - at.start
        return memory[at].view(-1)[: self.held * classes].view(self.held, classes)


def plan_of(
    hidden: Tensor, weight: Tensor, vocab: int, chunk_size: int, needs: list[bool], *, invariant: bool = False
) -> Plan:
    """``needs``: of hidden, weight and bias; where none is wanted, or all are False, nothing is held.

    ``chunk_size``: tokens whose logits may exist at once, beside those that the memory of the weight's gradient holds.
    ``invariant``: nothing is held, since a row's logits are float32 for its results and not for its gradient.
    """
    tokens, size = hidden.shape[0], hidden.element_size()
    width = min(weight.shape[0], ceil_div(vocab, PADDED) * PADDED)
    if invariant:
        return Plan(width, classes_per_slice(hidden, width, chunk_size), invariant=True)
    small = not chunk_size and tokens * width * size <= CHUNK_BYTES
    if any(needs) and tokens and (small or chunk_size >= tokens):
        return Plan(width, width, tokens, tokens)
    step = classes_per_slice(hidden, width, chunk_size)
    held, room = _held(hidden, chunk_size, width, needs)
    if held * WORTH < tokens or not held:
        return Plan(width, step)
    first = not chunk_size and needs[0] and held < tokens <= 2 * held
    step = min(step, classes_per_slice(hidden, width, part=FIRST_PART if first else SLICE_PART))
    if step < width:
        step = step // BLOCKS * BLOCKS or 1 << step.bit_length() - 1
    return Plan(width, step, held, room, limit=chunk_size, held_first=first)


def _held(hidden: Tensor, chunk_size: int, width: int, needs: list[bool]) -> tuple[int, int]:
    """Tokens that are held, and the elements of their memory for each class: what few tokens need is there anyway.

    With a limit none of float32: slices so narrow round those logits otherwise than the forward pass, and float32 has
    no coarser rounding that hides it.
    """
    tokens, channels = hidden.shape
    if chunk_size and hidden.element_size() > 2:
        return 0, 0
    if chunk_size <= channels:
        return (min(tokens, chunk_size or channels), channels) if needs[1] else (0, 0)
    of_slice = ceil_div(tokens * classes_per_slice(hidden, width), width)  # as many logits as a slice of all tokens
    held = max(chunk_size - of_slice, channels if needs[1] else 0) if any(needs) else 0
    return held, held


def classes_per_slice(hidden: Tensor, vocab: int, chunk_size: int = 0, part: float = SLICE_PART) -> int:
    """With ``chunk_size``, no more logits than that many tokens have."""
    tokens, size = max(1, hidden.shape[0]), hidden.element_size()
    budget = chunk_size * vocab * size or max(SLICE_BYTES, int(part * hidden.numel() * size))
    most = budget // (tokens * size)
    return max(1, min(vocab, most // ALIGNED * ALIGNED or most))


FillRows = Callable[[Tensor, slice, Layout], None]
"""``(z, tokens, layout)``: read the logits of these tokens and fill their results."""

FillGradient = Callable[[Tensor, slice, int, Tensor], None]
"""``(z, tokens, first class, out)``: write the gradient of a slice's logits of these tokens, into z itself or not."""


def are_kept_elsewhere() -> bool:
    """Whether a checkpoint or another hook takes what is kept for backward: it would not see held logits."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def by_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, chunk_size: int, fill: FillRows) -> None:
    """The results of the tokens that are not held, chunk by chunk."""
    weight, bias = weight[: plan.width], None if bias is None else bias[: plan.width]
    if plan.held:  # beside the memory that is held, no more than backward takes
        budget = CHUNK_BYTES if plan.held_first else max(CHUNK_BYTES, 8 * hidden.numel())
        most = max(1, budget // (plan.width * hidden.element_size()))
        chunk_size = min(most, plan.limit or most)
    chunk = rows_per_chunk(hidden[plan.held :], plan.width, chunk_size)
    for start in range(plan.held, hidden.shape[0], chunk):
        at = slice(start, min(start + chunk, hidden.shape[0]))
        z = plan.by.logits(hidden[at], weight, bias)
        fill(z, at, Layout(plan.width, plan.width))
        del z  # before the next chunk is allocated


def hold(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, fill: FillRows) -> Tensor:
    """The memory with the logits that the plan holds; all tokens' results are filled."""
    held = slice(0, plan.held)
    memory = hidden.new_empty(weight.shape[0] if plan.room == weight.shape[1] else plan.width, plan.room)
    whole = plan.width // plan.step if bias is None else 0  # slices that one batched product makes
    whole = whole if whole > 1 else 0
    if whole:
        batch = memory[: whole * plan.step].view(whole, -1)[:, : plan.held * plan.step]
        of_slices = weight[: whole * plan.step].view(whole, plan.step, -1).transpose(1, 2)
        torch.bmm(hidden[held].expand(whole, -1, -1), of_slices, out=batch.view(whole, plan.held, plan.step))
    for at in plan.slices()[whole:]:
        _logits_into(plan.held_logits(memory, at), hidden[held], weight[at], None if bias is None else bias[at])
    fill(memory, held, Layout(plan.width, plan.step, plan.room))
    by_rows(hidden, weight, bias, plan, 0, fill)
    return memory


def by_slices(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    plan: Plan,
    classes: int,
    memory: Tensor | None,
    factor: Tensor | None,
    fill: FillGradient,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, times ``factor`` if there is one: the sums get it.

    ``memory`` holds the logits of the plan's first tokens, and is written over; None where none are held.
    """
    shares = memory is not None and memory.shape == weight.shape
    _, d_weight, d_bias = empty_gradients(hidden, weight, [False, needs[1] and not shares, needs[2]])
    if needs[1] and shares and memory is not None:
        d_weight = memory
    one_product = plan.step >= plan.width and factor is None and not plan.invariant
    of_held, summed = hidden[:0], hidden  # gradients that are rounded already, and what the loop sums those of
    if memory is not None and plan.held_first and needs[0]:
        of_held, summed = _of_held(hidden, weight, plan, classes, memory, factor, fill), hidden[plan.held :]
    sums = hidden.new_zeros(summed.shape if needs[0] and not one_product else (0,), dtype=torch.float32)
    for at in plan.slices():
        z = _slice_gradient(hidden, weight, bias, plan, memory, shares, at, fill)
        of_slice = _without_padding(weight[at], max(0, classes - at.start))
        if needs[0] and one_product:
            sums = torch.mm(z, of_slice)
        elif needs[0]:
            plan.by.add(sums, z[of_held.shape[0] :], of_slice)
        if needs[1] and factor is not None:
            total = torch.zeros_like(d_weight[at], dtype=torch.float32)
            plan.by.add(total, z.T, hidden)
            d_weight[at] = total * factor
        elif needs[1]:
            plan.by.write(d_weight[at], z.T, hidden)
        if needs[2]:
            total = z.sum(0, dtype=torch.float32)
            d_bias[at] = total if factor is None else total * factor
        del z  # before the next slice is allocated
    for d in (d_weight, d_bias):
        d[classes:] = 0  # padding
    return _rounded(of_held, sums, factor), d_weight, d_bias


def _of_held(hidden, weight, plan, classes, memory, factor, fill: FillGradient) -> Tensor:
    """The gradient of the held tokens' hidden states.  Slices are as many times as wide as all tokens are more."""
    sums = hidden.new_zeros((plan.held, hidden.shape[1]), dtype=torch.float32)
    wide = plan.step * (hidden.shape[0] // plan.held)
    for first in range(0, plan.width, wide):
        several = slice(first, min(first + wide, plan.width))
        z = hidden.new_empty(plan.held, several.stop - first)
        for start in range(first, several.stop, plan.step):
            at = slice(start, min(start + plan.step, plan.width))
            fill(plan.held_logits(memory, at), slice(0, plan.held), start, z[:, start - first : at.stop - first])
        plan.by.add(sums, z, _without_padding(weight[several], max(0, classes - first)))
        del z  # before the next slice is allocated
    return _rounded(hidden[:0], sums, factor)


def _rounded(before: Tensor, sums: Tensor, factor: Tensor | None) -> Tensor:
    """Rows that are rounded, and those of sums times the factor after them; sums may be written over."""
    sums = sums if factor is None else sums.mul_(factor)
    if not before.shape[0]:
        return sums.to(before.dtype)
    out = before.new_empty(before.shape[0] + sums.shape[0], sums.shape[1])  # torch.cat would need sums rounded, too
    out[: before.shape[0]], out[before.shape[0] :] = before, sums
    return out


def _slice_gradient(hidden, weight, bias, plan, memory, shares, at, fill: FillGradient) -> Tensor:
    """The gradient of a slice's logits, all tokens: of those held in their place, or beside them, and of the others."""
    logits = None if memory is None else plan.held_logits(memory, at)
    in_place = logits is not None and plan.held == hidden.shape[0] and not shares
    z = logits if in_place else hidden.new_empty(hidden.shape[0], at.stop - at.start)
    if logits is not None:
        fill(logits, slice(0, plan.held), at.start, z[: plan.held])
    others = slice(plan.held if logits is not None else 0, hidden.shape[0])
    if others.start < others.stop:
        plan.by.logits_into(z[others], hidden[others], weight[at], None if bias is None else bias[at])
        fill(z[others], others, at.start, z[others])
    return z


def _without_padding(weight: Tensor, classes: int) -> Tensor:
    """The rows of a slice; zeros for those that are no classes, whatever they hold."""
    if classes >= weight.shape[0]:
        return weight
    return torch.cat((weight[:classes], torch.zeros_like(weight[classes:])))
