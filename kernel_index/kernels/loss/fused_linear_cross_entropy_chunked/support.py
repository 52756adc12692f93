"""Which classes the sampler keeps of each row: the ``top_k`` largest logits, and of those as few as hold ``top_p``.

Classes are taken by falling logit, the smaller index first among equals, and one is kept while the probability of those
before it is below ``top_p``.  So what is kept of a row is two numbers: the smallest logit kept, and how many of the
classes that have it are.  Both follow from the logits' values alone, without an order of the classes, and where the
classes are spread over processes from sums and the largest ``top_k`` logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.products import all_reduce


def kept_below(
    x: Tensor, scaled: Tensor, total: Tensor, top_k: int, top_p: float, group: str, f: Any
) -> tuple[Tensor, Tensor]:
    """(smallest logit kept, how many of the equal ones here are kept), each [rows], of logits x [rows, classes here].

    ``scaled`` is (x − maximum) / temperature and ``total`` [rows] the sum of its exponentials over all classes.
    ``top_k`` 0 and ``top_p`` 1 do not truncate; one of them does.
    ``f`` has the functions and sums: PyTorch's, or those of ``core.stable``.
    """
    if top_k:
        smallest, equals = _of_largest(x, scaled, top_k, top_p, group, f)
    else:
        smallest, equals = _of_all(x, scaled, total, top_p, group, f)
    if group:  # the processes before have smaller indices
        here = (x == smallest[:, None]).sum(-1)
        every = _gathered(here, group)
        equals = equals - every[: _rank(group)].sum(0)
    return smallest, equals.clamp(min=0)


def kept(x: Tensor, smallest: Tensor, equals: Tensor) -> Tensor:
    """Whether each class is kept, from the two numbers of its row."""
    same = x == smallest[:, None]
    return (x > smallest[:, None]) | (same & (same.cumsum(-1, dtype=torch.int32) <= equals[:, None]))


def _of_largest(x: Tensor, scaled: Tensor, top_k: int, top_p: float, group: str, f: Any) -> tuple[Tensor, Tensor]:
    """The sampler's own sums over the largest logits, whose values are the same whichever of equal ones is taken."""
    count = min(top_k, x.shape[1])
    best, at = x.topk(count)
    both = torch.stack((best, scaled.gather(-1, at)))  # [2, rows, count]
    if group:
        missing = both.new_full((*both.shape[:2], top_k - count), -torch.inf)
        both = _gathered(torch.cat((both, missing), -1), group).movedim(0, -2).flatten(-2)  # [2, rows, processes · k]
        order = both[0].topk(top_k).indices
        both = both.gather(-1, order.expand(2, *order.shape))
    best, scaled = both
    number = torch.full((x.shape[0], 1), best.shape[1], device=x.device)
    if top_p < 1:
        p = f.softmax(scaled)
        number = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True).clamp(min=1)
    smallest = best.gather(-1, number - 1)
    return smallest[:, 0], (number - (best > smallest).sum(-1, keepdim=True))[:, 0]


def _of_all(x: Tensor, scaled: Tensor, total: Tensor, top_p: float, group: str, f: Any) -> tuple[Tensor, Tensor]:
    """Bisect the bits of the smallest logit kept: one sum over the classes for each, and no sorted copy."""
    e, goal = f.exp(scaled), total * top_p

    def above(value: Tensor) -> Tensor:
        found = f.row_sum(torch.where(x > value[:, None], e, 0.0))
        return all_reduce(found, "sum", group) if group else found

    smallest = _first(x.dtype, goal, lambda value: above(value) < goal)
    row_max = torch.where(x == smallest[:, None], scaled, -torch.inf)
    of_smallest = row_max.amax(-1) if x.shape[1] else row_max.new_full(goal.shape, -torch.inf)
    of_smallest = all_reduce(of_smallest, "max", group) if group else of_smallest
    equals = ((goal - above(smallest)) / f.exp(of_smallest)).ceil()
    return smallest, equals.nan_to_num(1.0, posinf=2.0**31).clamp(1, 2.0**31).long()


def _first(dtype: torch.dtype, like: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The smallest value of each row for which ``holds``, which holds for all larger ones too."""
    low, high = (_rank_of(like.new_full(like.shape, value, dtype=dtype)) for value in (-torch.inf, torch.inf))
    for _ in range(8 * dtype.itemsize):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        found = holds(_value_of(middle, dtype))
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return _value_of(high, dtype)


def _rank_of(value: Tensor) -> Tensor:
    """Bits of a float as an integer of the same order."""
    integer, mask = (torch.int32, 2**31 - 1) if value.dtype == torch.float32 else (torch.int64, 2**63 - 1)
    bits = value.view(integer)
    return (bits ^ ((bits >> 8 * integer.itemsize - 1) & mask)).long()


def _value_of(rank: Tensor, dtype: torch.dtype) -> Tensor:
    integer, mask = (torch.int32, 2**31 - 1) if dtype == torch.float32 else (torch.int64, 2**63 - 1)
    rank = rank.to(integer)
    return (rank ^ ((rank >> 8 * integer.itemsize - 1) & mask)).view(dtype)


def _gathered(value: Tensor, group: str) -> Tensor:
    """The values of all processes, [processes, …]."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_gather_tensor(value.contiguous()[None], 0, _group(group)))


def _rank(group: str) -> int:
    import torch.distributed as dist

    return dist.get_rank(_group(group))


def _group(name: Any) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)
