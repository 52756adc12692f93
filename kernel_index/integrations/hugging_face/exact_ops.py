"""Finds what is not exact in the code of a model: one call under a mode that sees every operator.

Our kernels have recipes.  Between them a model may move values, compare them, and use the operators that are correctly
rounded: their bits depend on the operands alone.  Any other operator on floating numbers is refused, with its module.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_index.core.numerics import Ineligible, is_invariant
from kernel_index.integrations.hugging_face.change import evaluating
from kernel_index.integrations.hugging_face.invariant import REFUSED, refuse

MOVING = """
    _to_copy _unsafe_view alias as_strided cat clone constant_pad_nd copy_ detach embedding empty empty_like
    empty_strided expand eye fill fill_ flip full full_like gather index index_select lift_fresh masked_fill
    masked_fill_ narrow new_empty new_full new_ones new_zeros ones ones_like permute repeat roll scalar_tensor select
    slice slice_scatter split split_with_sizes squeeze stack t transpose tril triu unbind unsqueeze view view_as_complex
    view_as_real where zero_ zeros zeros_like
"""
ROUNDED = """
    abs amax amin clamp clamp_min div div_ max maximum min minimum mul mul_ neg neg_ reciprocal relu relu_ rsub sqrt
"""
SUMS = ("add", "add_", "sub", "sub_")
"""Exact without a factor ``alpha``: a product and a sum may be contracted or not."""
ALIKE_ON_A_GPU = ("cos", "sin")
"""There PyTorch computes every element by one kernel."""

WHOLE = 2**24
"""Below it float32 holds every whole number; bfloat16 and float16 round larger ones once."""

EXACT = frozenset((*MOVING.split(), *ROUNDED.split(), *SUMS))


def check(model: Any) -> None:
    """Call the model on a few tokens, padded and then from its cache, and with labels; raise ``Ineligible``."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        refuse("the model", "its weights are on the meta device, and it has to be tried")
    names = {id(m): name for name, m in model.named_modules()}
    with evaluating(model), torch.no_grad(), _Looking(names) as looking:
        try:
            _try(model)
        except Ineligible as error:
            if REFUSED in str(error):
                raise
            raise Ineligible(f"{looking.where()}: {REFUSED} ({error})") from error


def _try(model: Any) -> None:
    accepted = inspect.signature(model.forward).parameters
    ids = torch.tensor([[0, 1, 0], [1, 0, 1]], device=model.device)
    real = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    kept = model(input_ids=ids, attention_mask=real, **({"use_cache": True} if "use_cache" in accepted else {}))
    if getattr(kept, "past_key_values", None) is not None:
        longer = torch.nn.functional.pad(real, (0, 1), value=1)
        model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=kept.past_key_values)
    if "labels" in accepted:
        model(input_ids=ids, labels=ids)


class _Looking(TorchDispatchMode):
    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names, self.last = names, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if is_invariant() and not is_exact(func, args, kwargs or {}, found):
            raise Ineligible(f"{self.where()}: {REFUSED} ({func} of PyTorch has no invariant form)")
        return found

    def where(self) -> str:
        """The innermost module of the model whose forward runs here."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.names:
                self.last = f"{self.names[id(owner)] or 'the model'} ({type(owner).__name__})"
                break
            frame = frame.f_back
        return self.last or "the model"


def is_exact(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> bool:
    if func.namespace == "kernel_index":  # it has a recipe, or would have been refused
        return True
    if not any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(found)):
        return True  # whole numbers and comparisons
    name = func.overloadpacket.__name__
    if name == "pow":
        return not isinstance(args[1], Tensor) and args[1] == 2
    if name == "arange":  # of whole numbers: others are sums whose rounding follows an element's place in a vector
        return all(float(number).is_integer() and abs(number) < WHOLE for number in args)
    if name in ALIKE_ON_A_GPU:
        return args[0].is_cuda
    return name in EXACT and (name not in SUMS or kwargs.get("alpha", 1) == 1)
