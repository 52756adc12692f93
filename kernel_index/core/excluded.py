"""What a mask excludes has no influence, also where it is NaN or infinity; the rule of every backend of plain PyTorch.

A kernel that multiplies a weight of 0 with an excluded key makes NaN of NaN and of infinity.  Such a kernel gets
operands without them: 0 stands where q, k or v is not finite.  Its rows are then what they are with any finite values
there, bit by bit, if they see none of the replaced ones.  A row that does see one becomes NaN, and so do the gradients
of its query and of the keys and values that were replaced: nothing that went wrong is hidden.

On a GPU nobody may wait for values.  Kernels that hide excluded keys by rows of their own, without empty rows, get
copies of k and v from one launch of ours, and a second one writes NaN where it belongs: to rows of the output and of
the gradient of q.  The gradients of replaced keys are then what the gradient from above makes of them.  See
docs/decisions/0015.

A query that sees no key is not touched by its own values.  The gradient that comes from above is another operand:
``guarded_backward`` does the same for it, where the backward pass is ours.  In the backward passes of PyTorch and of
packages (``reference``, ``sdpa``, ``flex``, ``varlen``, ``fa4``), and in that of ``gluon``, a NaN in the gradient of a
row reaches the values and keys that the row does not see, unless that row is empty or NaN itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import ops, rules
from kernel_index.core.attention_function import Backward, Gradients
from kernel_index.core.triton.launch import dense_heads


class Sight(NamedTuple):
    """The keys that each query sees, by groups of heads: ``low[b, t, g, i] ≤ s < high[b, t, g, i]`` for some i.

    int64 [B or 1, T, G, n]; an interval is empty where ``low = high``.  G is a multiple or a divisor of the KV heads
    and a divisor of the query heads.
    """

    low: Tensor
    high: Tensor

    def rows_with_keys(self, heads: int) -> Tensor:
        """Which query heads see a key at all, bool [B or 1, T, H]."""
        some = (self.high > self.low).any(3)
        return some.repeat_interleave(heads // some.shape[2], 2)

    def rows_that_see(self, keys: Tensor, heads: int) -> Tensor:
        """Which query heads see one of the keys at least, bool [B, T, H] from bool [B, S, K]."""
        groups = max(self.low.shape[2], keys.shape[2])
        keys = keys.repeat_interleave(groups // keys.shape[2], 2)
        before = torch.nn.functional.pad(keys.to(torch.int64).cumsum(1), (0, 0, 1, 0))  # [B, S + 1, groups]
        low, high = self._flat(keys.shape[0], groups)
        counts = before.gather(1, high) - before.gather(1, low)
        seen = (counts > 0).unflatten(1, (self.low.shape[1], self.low.shape[3])).any(2)
        return seen.repeat_interleave(heads // groups, 2)

    def keys_seen_by(self, rows: Tensor, keys: int, kv_heads: int) -> Tensor:
        """Which keys one of the rows sees, bool [B, S, K] from bool [B, T, H]."""
        groups = max(self.low.shape[2], kv_heads)
        low, high = self._flat(rows.shape[0], groups)
        some = rows.unflatten(2, (groups, rows.shape[2] // groups)).any(3)
        amount = some.to(torch.int64)[:, :, None].expand(-1, -1, self.low.shape[3], -1).flatten(1, 2)
        change = amount.new_zeros(rows.shape[0], keys + 1, groups)
        change = change.scatter_add(1, low, amount).scatter_add(1, high, -amount)
        seen = change.cumsum(1)[:, :keys] > 0
        return seen.unflatten(2, (kv_heads, groups // kv_heads)).any(3)

    def _flat(self, batch: int, groups: int) -> tuple[Tensor, Tensor]:
        """Both bounds [B, T·n, groups]."""

        def flat(bound: Tensor) -> Tensor:
            bound = bound.repeat_interleave(groups // bound.shape[2], 2).transpose(2, 3)
            return bound.expand(batch, -1, -1, -1).flatten(1, 2)

        return flat(self.low), flat(self.high)


class PairSight(NamedTuple):
    """What ``Sight`` tells, for queries whose keys are no few intervals: pairs are compared, some queries at a time.

    ``low`` and ``high`` bound the keys of a query [rows, T], and are equal where it sees none.  ``allowed`` gives bool
    [rows, n, S] for a slice of n queries.
    """

    low: Tensor
    high: Tensor
    allowed: Callable[[slice], Tensor]

    def rows_with_keys(self, heads: int) -> Tensor:
        return (self.high > self.low)[..., None].expand(-1, -1, heads)

    def rows_that_see(self, keys: Tensor, heads: int) -> Tensor:
        wide = keys.to(torch.float32)
        seen = torch.cat([self.allowed(chunk).to(wide.dtype) @ wide > 0 for chunk in self._chunks(keys.shape[1])], 1)
        return seen.repeat_interleave(heads // keys.shape[2], 2)

    def keys_seen_by(self, rows: Tensor, keys: int, kv_heads: int) -> Tensor:
        wide = rows.unflatten(2, (kv_heads, rows.shape[2] // kv_heads)).any(3).to(torch.float32)
        counts = sum(
            self.allowed(chunk).to(wide.dtype).transpose(1, 2) @ wide[:, chunk] for chunk in self._chunks(keys)
        )
        return torch.as_tensor(counts) > 0

    def _chunks(self, keys: int) -> list[slice]:
        step = max(1, PAIRS_AT_ONCE // max(1, keys * self.low.shape[0]))
        return [slice(t, t + step) for t in range(0, self.low.shape[1], step)]


PAIRS_AT_ONCE = 1 << 24


def sight_of_intervals(start: Tensor, end: Tensor) -> Sight:
    """Each query sees the keys ``start ≤ s < end`` [rows, T]."""
    low, high = (x.to(torch.int64)[:, :, None, None] for x in (start, end))
    return Sight(low, torch.maximum(low, high))


def sight_of_blocks(
    selected: Tensor, valid: Tensor | None, block_size: int, start: Tensor, end: Tensor, origin: Tensor | None = None
) -> Sight:
    """Each query sees the keys ``start ≤ s < end`` of its selected blocks [B, T, G, n]; −1 selects none.

    A token is a block of one key.  Blocks count from key ``origin`` [rows, T], from key 0 where there is none.
    """
    low, high = (x.to(torch.int64)[:, :, None, None] for x in (start, end))
    first = selected.to(torch.int64) * block_size
    if origin is not None:
        first = first + origin.to(torch.int64)[:, :, None, None]
    exists = selected >= 0 if valid is None else (selected >= 0) & valid
    from_key = torch.minimum(torch.maximum(first, low), high)
    to_key = torch.where(exists, torch.minimum(first + block_size, high), 0)
    from_key = torch.where(exists, from_key, 0)
    return Sight(from_key, torch.maximum(from_key, to_key))


def run_guarded(run: Callable[[Any], Any], call: Any, on_device: bool = False, selects: bool = False) -> Any:
    """``run(call)`` of a backend of attention, ``out`` or ``(out, lse)``, under the rule of this module.

    A call has ``q`` [B, T, H, D], ``k`` and ``v`` [B, S, K, …], ``excludes`` (whether some query does not see some key)
    and ``sight()``.  Where values may be read (plain tensors on a CPU) finite operands, or a finite output where there
    is no backward pass, show that there is nothing to do.  Elsewhere nothing waits: the operands are always cleaned,
    by two kernels of ours ``on_device``, which is for calls in which each query sees a key, or no NaN of its own
    reaches the others.  ``selects``: the kernel replaces the scores of what is excluded, so keys stay as they are
    where there is no backward pass.
    """
    operands = call.q, call.k, call.v
    if rules.host_readable(*operands):
        if rules.wants_gradient(*operands):
            if all_finite(*operands):
                return run(call)
        else:
            found = run(call)
            if all_finite(found if isinstance(found, Tensor) else found[0]):
                return found
    if not call.excludes or call.k.shape[1] == 0:
        return run(call)
    if on_device and _takes_triton(*operands):
        return _on_device(run, call, selects)
    finite = [x.isfinite() for x in operands]
    cleaned = [torch.where(of_x, x, 0.0) for of_x, x in zip(finite, operands, strict=True)]
    found = run(call._replace(q=cleaned[0], k=cleaned[1], v=cleaned[2]))
    bad_q, bad_k, bad_v = (~of_x.all(-1) for of_x in finite)
    return _spoiled(found, call, bad_q, bad_k | bad_v)


def _takes_triton(*operands: Tensor) -> bool:
    if rules.host_readable(*operands) or torch.compiler.is_compiling():
        return False
    return rules.triton_why_not(*operands) is None


def guarded(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The backend ``run`` that ``run_guarded`` runs."""

    @functools.wraps(run)
    def guarded_run(call: Any) -> Any:
        return run_guarded(run, call)

    return guarded_run


def guarded_on_device(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same for kernels of packed lengths: they leave out rows and keys of no document, and select scores."""

    @functools.wraps(run)
    def guarded_run(call: Any) -> Any:
        return run_guarded(run, call, on_device=True, selects=True)

    return guarded_run


class _Finite(torch.autograd.Function):
    """Finite keys and values for a kernel that is not ours; NaN in the gradients of the queries that see others."""

    @staticmethod
    def forward(ctx: Any, bounds: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        from kernel_index.core.triton.excluded import finite_keys

        k, v, ctx.keys = finite_keys(k, v, copy_k=True)
        ctx.bounds = bounds
        return q.view_as(q), k, v, ctx.keys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None, d_v: Tensor | None, _: Any) -> tuple[Any, ...]:
        from kernel_index.core.triton.excluded import mark_rows

        if d_q is not None:
            d_q = dense_heads(d_q)
            mark_rows(d_q, None, ctx.keys, *ctx.bounds)  # in place: the kernel made it, and nobody else has it yet
        return None, d_q, d_k, d_v


def _on_device(run: Callable[[Any], Any], call: Any, selects: bool) -> Any:
    """What ``run_guarded`` promises, by two launches.

    The second one writes to an output that the backward pass may have kept.  So a row that is NaN is NaN there too;
    with a window, its NaN reaches the gradients of some keys beside those that it sees.
    """
    from kernel_index.core.triton.excluded import finite_keys, mark_rows

    q, (k, v) = call.q, map(dense_heads, (call.k, call.v))
    bounds = call.mask.row_bounds(call.sizes)
    if rules.wants_gradient(q, k, v):
        q, k, v, keys = ops.apply(_Finite, bounds, q, k, v)
    else:
        k, v, keys = finite_keys(k, v, copy_k=not selects)
    found = run(call._replace(q=q, k=k, v=v))
    out, lse = (found, None) if isinstance(found, Tensor) else found
    mark_rows(out.detach(), None if lse is None else lse.detach(), keys, *bounds)
    return found


def _spoiled(found: Any, call: Any, queries: Tensor, keys: Tensor) -> Any:
    """NaN in the rows that see one of the keys, and in those of the queries that see a key.

    Args:
        found: ``out`` [B, T, H, Dv], or that and ``lse`` [B, H, T] or None.
        call: the call, for its operands and its sight.
        queries: bool [B, T, H].
        keys: bool [B, S, K].
    """
    sight, heads = call.sight(), call.q.shape[2]
    sees = sight.rows_with_keys(heads)
    rows = (sight.rows_that_see(keys, heads) | queries) & sees
    if rules.wants_gradient(call.q, call.k, call.v):
        nan = _nan_with_gradient(call, rows, keys & sight.keys_seen_by(sees.expand_as(rows), *keys.shape[1:]))
    else:
        nan = call.q.new_full((1, 1, 1), math.nan)
    if isinstance(found, Tensor):
        return torch.where(rows[..., None], nan[..., None], found).contiguous()
    out, lse = found
    out = torch.where(rows[..., None], nan[..., None], out).contiguous()
    if lse is not None:
        lse = torch.where(rows.transpose(1, 2), nan.transpose(1, 2).to(lse.dtype), lse).contiguous()
    return out, lse


def _nan_with_gradient(call: Any, rows: Tensor, keys: Tensor) -> Tensor:
    """NaN [B, T, H], of which the gradients of these rows' queries, of these keys and of their values are NaN too."""
    each = torch.where(rows[..., None], call.q, 0.0).sum(-1)
    of_keys, of_values = (torch.where(keys[..., None], x, 0.0).sum((1, 3)) for x in (call.k, call.v))  # [B, K]
    shared = (of_keys + of_values).repeat_interleave(rows.shape[2] // keys.shape[2], 1)[:, None]
    return (each + shared) * math.nan


def guarded_backward(
    run: Callable[[Backward], Gradients], sight: Callable[[], Sight | PairSight], given: Backward
) -> Gradients:
    """``run(given)`` where the gradient from above is finite.  For backends on a CPU: values are read.

    Else the rows in which it is not, and those whose output is not, send nothing; then the gradients of their queries
    become NaN, and so do those of the keys, values and sink logits that they see.
    """
    checked = given.d_out, given.out, given.d_lse
    if all_finite(*(x for x in checked if x is not None)):
        return run(given)
    rows = _not_finite(given.d_out) | _not_finite(given.out)  # [B, T, H]
    if given.d_lse is not None:
        rows = rows | ~given.d_lse.isfinite().transpose(1, 2)
    at, (keys, kv_heads) = rows[..., None], given.k.shape[1:3]
    found = run(
        given._replace(
            d_out=given.d_out.masked_fill(at, 0.0),
            out=given.out.masked_fill(at, 0.0),
            d_lse=None if given.d_lse is None else given.d_lse.masked_fill(rows.transpose(1, 2), 0.0),
        )
    )
    seen = sight()
    rows = rows & seen.rows_with_keys(rows.shape[2])
    of_keys = seen.keys_seen_by(rows, keys, kv_heads)[..., None]

    def with_nan(gradient: Tensor | None, where: Tensor) -> Tensor | None:
        return None if gradient is None else gradient.masked_fill(where, math.nan)

    return Gradients(
        with_nan(found.q, rows[..., None]),
        with_nan(found.k, of_keys),
        with_nan(found.v, of_keys),
        with_nan(found.sink, rows.any(0).any(0)),
    )


def all_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite.  One pass: a sum is not finite if one of its terms is not.

    False too where the sum overflows: the caller then does with care what it would have done without.
    """
    sums = [x.detach().sum(dtype=torch.float32 if x.dtype == torch.float16 else None) for x in tensors]
    return math.isfinite(sum(sums[1:], sums[0]).item())


def finite_part(x: Tensor) -> Tensor:
    """0 where x is not finite; so is the gradient."""
    return torch.where(x.isfinite(), x, 0.0)


def _not_finite(x: Tensor) -> Tensor:
    """bool [B, T, H] of x [B, T, H, D]."""
    return ~x.isfinite().all(-1)
