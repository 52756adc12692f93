"""Under ``torch.compile``: a causal call without padding and without positions needs no mask.

While it is traced, Transformers makes a dense mask, since it cannot look whether positions begin anew inside a row.
Where the caller gives no positions, the model counts them itself and they do not.  Then ours runs where it is faster
than PyTorch's, and PyTorch's is asked for a causal attention elsewhere.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernel_index.core import rules
from kernel_index.core.target import Target, fa4_package_why_not, target_of
from kernel_index.integrations.hugging_face.change import Recipe, replace_forward
from kernel_index.integrations.hugging_face.implementation import own_implementation

MAKER = "create_causal_mask"
SHAPE = (0, 0, 0, 0)
"""Of the tensor that stands for the mask: a model hands on what has four dimensions, and nobody can read a value."""

ABSENT = ("attention_mask", "position_ids", "past_key_values")
"""Arguments with which a call is no longer plain."""


def is_plain(mask: Any) -> bool:
    return isinstance(mask, Tensor) and tuple(mask.shape) == SHAPE


def is_faster_here(query: Tensor) -> bool:
    """Whether ``ki.attention`` runs by flash-attn-4, in a graph too, and faster than PyTorch's: query [B, H, T, D]."""
    if target_of(query.device) != Target("cuda", 90) or query.dtype not in rules.HALF:
        return False
    return query.shape[3] in (64, 128) and fa4_package_why_not() is None


def replace(model: nn.Module) -> list[Callable[[], None]]:
    """Change the forwards that make a causal mask and no other; every attention layer must be ours already."""
    return [replace_forward(module, Recipe(forward_of)) for module in model.modules() if _makes_one_mask(module)]


def _makes_one_mask(module: nn.Module) -> bool:
    if "forward" in vars(module) or own_implementation(getattr(module, "config", None)) != "sdpa":
        return False
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    masks = {name for name in getattr(code, "co_names", ()) if "mask" in name}
    return masks == {MAKER} and set(ABSENT) <= set(inspect.signature(forward).parameters)


def forward_of(base: type) -> Callable[..., Any]:
    names = list(inspect.signature(base.forward).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            given = dict(zip(names, args, strict=False)) | kwargs
            tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
            if tokens is not None and all(given.get(name) is None for name in ABSENT):
                given["attention_mask"] = torch.empty(SHAPE, dtype=torch.bool, device=tokens.device)
                return base.forward(self, **given)
        return base.forward(self, *args, **kwargs)

    return forward
