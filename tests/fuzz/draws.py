"""Sizes and random tensors that the calls share."""

import random

import torch
from torch import Tensor

B, T, H, K, D = 2, 6, 4, 2, 4


def floats(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def whole(rng: random.Random, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
