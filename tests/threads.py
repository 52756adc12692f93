"""Runs a call with another number of threads."""

from collections.abc import Callable
from typing import Any

import torch


def with_threads(threads: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_num_threads(before)
