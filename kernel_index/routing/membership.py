"""A list of selected indices as a table of what is selected."""

import torch
from torch import Tensor


def membership(selected: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Which of ``count`` blocks or tokens each list selects, bool [..., count]; a duplicate counts once.

    Args:
        selected: integers [..., n]; an index outside [0, count) selects nothing.
        valid: bool of the same shape, False where nothing is selected; None where the index alone says it.
        count: number of blocks or tokens.
    """
    chosen = (selected >= 0) & (selected < count)
    if valid is not None:
        chosen = chosen & valid
    index = torch.where(chosen, selected, count).to(torch.int64)  # one more column for what selects nothing
    table = torch.zeros((*selected.shape[:-1], count + 1), dtype=torch.bool, device=selected.device)
    return table.scatter(-1, index, torch.ones((), dtype=torch.bool, device=index.device).expand_as(index))[..., :-1]
