"""Tables that the host makes, on a device."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on ``device``.  Nothing waits: a copy to a GPU from memory that is not pinned waits for the work before it."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
