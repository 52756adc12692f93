"""Mamba-2's recurrence under ``numerics("invariant")`` on a GPU, by the kernels of ordinary mode.

They divide a row into chunks.  So each document is put at the beginning of a chunk, with tokens after its last one that
have no step; and a decoding step keeps the inputs of its open chunk and scans that again from the state before it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import device_rows, ops
from kernel_index.core.force import forced_for
from kernel_index.core.triton.launch import ceil_div, interpreting

if TYPE_CHECKING:
    from kernel_index.nn.state_space import Mamba2, MixerState

CHUNK = 64
"""A multiple of the tokens that the kernels take for a chunk, on any device and in any dtype."""


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels run here: on a GPU, or where the interpreter is asked for by name."""
    if x.is_cuda:
        return True
    forced = forced_for("ssd_scan") if interpreting() else None
    return forced is not None and forced[0] == "triton"


class Layout(NamedTuple):
    """Where tokens stand among padded rows.

    ``tokens`` [B, length]: the token of each place, counted in B·T, −1 for padding; ``places`` [B, T], the reverse; and
    ``segments`` [B, length], the number of the document.
    """

    tokens: Tensor
    places: Tensor
    segments: Tensor


LENGTHS = 16
"""Lengths of rows in chunks up to twice the tokens of a row: few, since a recorded step holds for one length."""


def length_for(longest: int, tokens: int) -> int:
    """The length of rows in chunks, of which the longest needs so many places; ``tokens`` where nothing need move."""
    grid = CHUNK * max(1, tokens // (LENGTHS * CHUNK))
    return tokens if longest == tokens else ceil_div(longest, grid) * grid


def length_of_chunks(lengths: Sequence[Sequence[int]], tokens: int) -> int:
    """The same from the lengths of each row's documents, without reading the device."""
    padded = ((*row, tokens - sum(row)) for row in lengths)
    return length_for(max(sum(ceil_div(n, CHUNK) * CHUNK for n in row) for row in padded), tokens)


def remembered_length(mask: "ki.MaskContract", ids: Tensor, read: Callable[[], int]) -> int:
    """The length of the mask's rows in chunks, which who made the mask may know already."""
    return mask.remember("length in chunks", tuple(ids.shape), lambda: (read(),))[0]


def layout_of(
    ids: Tensor | None, rows: int, tokens: int, device: torch.device, mask: "ki.MaskContract | None" = None
) -> Layout:
    """Reads the longest row's length on the host, where there are documents and the mask does not remember it."""
    at = torch.arange(tokens, device=device).expand(rows, -1)
    begins = at == 0
    if ids is not None:
        begins = begins | (torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True))
    number = begins.to(torch.int64).cumsum(-1) - 1
    within = at - torch.where(begins, at, 0).cummax(-1).values
    lengths = torch.zeros_like(at).scatter_reduce(1, number, within + 1, "amax")  # of the documents in their order
    padded = (lengths + CHUNK - 1) // CHUNK * CHUNK
    places = (padded.cumsum(-1) - padded).gather(1, number) + within

    def read() -> int:
        return length_for(int(padded.sum(-1).max()), tokens)

    if ids is None:
        length = ceil_div(tokens, CHUNK) * CHUNK
    else:
        length = read() if mask is None else remembered_length(mask, ids, read)
    numbers = torch.arange(rows * tokens, device=device).view(rows, tokens)
    found = torch.full((rows, length), -1, device=device).scatter(1, places, numbers)
    starts = torch.zeros(rows, length, dtype=torch.int64, device=device).scatter_add(1, places, begins.to(torch.int64))
    offset = torch.arange(rows, device=device)[:, None] * length
    return Layout(found, places + offset, starts.cumsum(-1).to(torch.int32))


class _Moved(torch.autograd.Function):
    """Rows of x [n, …] at ``there``, zeros where that is −1; ``back`` is where each row of x went."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return _rows_at(x, there)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _rows_at(g.flatten(0, there.ndim - 1), back), None, None


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """[..., …] for ``index`` [...]."""
    if x.is_cuda:
        return device_rows.rows_at(x, index)
    found = x.index_select(0, index.clamp(min=0).flatten()).unflatten(0, index.shape)
    return found.masked_fill_((index < 0).view(*index.shape, *[1] * (x.ndim - 1)), 0)


def mixed(layer: "Mamba2", inputs: Tensor, step: Tensor, mask: "ki.MaskContract | None", ids: Tensor | None) -> Tensor:
    """The convolution, the scan and the skip, [B, T, H, P]; ``ids`` [B or 1, T] change between documents."""
    rows, tokens = inputs.shape[:2]
    where = inputs.device

    def build() -> Layout:
        return layout_of(ids, rows, tokens, where, mask)

    def number() -> Tensor:
        if ids is None:
            return torch.zeros(1, tokens, dtype=torch.int32, device=where)
        return torch.nn.functional.pad((ids[:, 1:] != ids[:, :-1]).to(torch.int32).cumsum(-1), (1, 0))

    if mask is None or ids is None:
        layout, numbers = build(), number()
    else:
        layout = mask.remember("chunked", (rows, tokens, where), build)
        numbers = mask.remember("numbered", (rows, tokens, where), number)
    before = inputs.new_zeros(rows, layer.width - 1, inputs.shape[-1])
    convolved = _convolved(layer, inputs, numbers, before)
    state = torch.zeros(rows, layer.heads, layer.head_dim, layer.state, dtype=torch.float32, device=where)
    if layout.tokens.shape[1] == tokens:  # every document fills its chunks: a padded row would be longer
        return _scanned(layer, convolved, step, layout.segments, state).y
    back = layout.places.flatten()
    moved = ops.apply(_Moved, convolved.flatten(0, 1), layout.tokens, back)
    steps = ops.apply(_Moved, step.flatten(0, 1), layout.tokens, back).masked_fill(
        (layout.tokens < 0)[..., None], -torch.inf
    )
    y = _scanned(layer, moved, steps, layout.segments, state).y
    return ops.apply(_Moved, y.flatten(0, 1), layout.places, layout.tokens.flatten())


def _convolved(layer: "Mamba2", inputs: Tensor, numbers: Tensor, before: Tensor) -> Tensor:
    """Always with segments and a state, so that one kernel does it."""
    return ki.causal_conv1d(inputs, layer.conv.T, activation="silu", segments=numbers, state=before)


def _scanned(layer: "Mamba2", x_BTC: Tensor, step: Tensor, segments: Tensor, state: Tensor) -> "ki.Scanned":
    """The same: a kernel for everything."""
    inner, shared = layer.heads * layer.head_dim, layer.groups * layer.state
    x, b, c = x_BTC.split([inner, shared, shared], -1)
    b_BTGN, c_BTGN = (t.unflatten(-1, (layer.groups, layer.state)) for t in (b, c))
    options: dict[str, Any] = {"segments": segments, "state": state, "d": layer.skip, "dt_bias": layer.step_bias}
    x_BTHP, rate = x.unflatten(-1, (layer.heads, layer.head_dim)), -layer.log_decay.exp()
    return ki.ssd_scan(x_BTHP, step, rate, b_BTGN, c_BTGN, dt_softplus=True, **options)


def no_tokens(layer: "Mamba2", like: Tensor) -> tuple[Tensor, ...]:
    """What a state keeps before any token, for the rows of ``like``: of the open chunk the convolved inputs and the
    steps, [B, CHUNK, …], and how many tokens there are, int64 [B].
    """
    tokens = (like.new_zeros(len(like), CHUNK, width) for width in layer.sizes[1:])
    return *tokens, torch.zeros(len(like), dtype=torch.int64, device=like.device)


def continued(layer: "Mamba2", inputs: Tensor, step: Tensor, cache: "MixerState") -> Tensor:
    """``mixed`` of new tokens [B, T, …] after those of the cache.  Nothing is read on the host."""
    tokens, like = inputs.shape[1], inputs.dtype
    numbers = torch.zeros(1, tokens, dtype=torch.int32, device=inputs.device)
    convolved = _convolved(layer, inputs, numbers, cache.conv.to(like))
    kept, kept_steps, old = cache.open
    total = old + (tokens if cache.counts is None else cache.counts)  # [B]
    joined = torch.cat([kept.to(like), convolved], 1)
    steps = torch.cat([kept_steps.to(step.dtype), step], 1)
    place = torch.arange(ceil_div(CHUNK - 1 + tokens, CHUNK) * CHUNK, device=inputs.device)

    def source_of(place: Tensor, end: Tensor) -> Tensor:
        """Where the tokens before ``end`` [B] stand in ``joined``; −1 for the others."""
        source = torch.where(place < old[:, None], place, CHUNK + place - old[:, None])
        return torch.where(place < end[:, None], source, -1)

    source = source_of(place, total)  # [B, length]
    segments = torch.zeros(1, len(place), dtype=torch.int32, device=inputs.device)
    y = _scanned(layer, _taken(joined, source, 0.0), _taken(steps, source, -torch.inf), segments, cache.scan).y
    whole = total // CHUNK * CHUNK
    with torch.inference_mode(False), torch.no_grad():  # in this order; a state is a constant, and stays usable
        given = (joined.detach().clone(), steps.detach().clone())
        closed = source_of(place, whole)
        x, dt = _taken(given[0], closed, 0.0), _taken(given[1], closed, -torch.inf)
        last = _scanned(layer, x, dt, segments, cache.scan)
        left = source_of(place[:CHUNK] + whole[:, None], total)
        cache.open = *(_taken(t, left, 0.0) for t in given), total - whole
        cache.scan = last.state.clone()
    at = (old[:, None] + torch.arange(tokens, device=inputs.device)).clamp(max=len(place) - 1)
    return y.gather(1, at[..., None, None].expand(-1, -1, *y.shape[2:]))


def _taken(x: Tensor, source: Tensor, padding: float) -> Tensor:
    """[B, n, C] of x [B, m, C] at ``source`` [B, n]; ``padding`` where that is −1."""
    found = x.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return found.masked_fill((source < 0)[..., None], padding)
