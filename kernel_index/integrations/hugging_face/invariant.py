"""``apply(model, numerics="invariant")``: what a model needs beside our kernels so that a row's bits are its own.

Linear layers become ``ki.linear``, angles get the cosine and sine of ``core.stable``, and every forward of the model
runs in the mode, and so does every layer that a checkpoint may recompute.  Dropout in training refuses.  What is left
is code of the model: ``exact_ops`` looks at it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kernel_index as ki
from kernel_index.core import stable
from kernel_index.core.numerics import Ineligible
from kernel_index.integrations.hugging_face import compiled, one_order
from kernel_index.integrations.hugging_face.change import Change, Plan, Recipe, replace_forward

KIND = "numerics"
Modules = tuple[nn.Module, ...]
REFUSED = "numerics('invariant') cannot run this call"


def refuse(where: str, why: str) -> None:
    """Raise the error of a module that has no invariant form for a call."""
    raise Ineligible(f"{where}: {REFUSED} ({why})")


def name_of(module: nn.Module) -> str:
    """A layer's class, with its number where it has one."""
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ if layer is None else f"{type(module).__name__} {layer}"


def plans(model: nn.Module, has_mode: Modules) -> list[Plan]:
    """The plans of linear layers, angles and dropout; then the mode, for the models inside that do not have it yet."""
    heads = output_layers(model)
    found = [_plan_of(name, m, has_mode, heads) for name, m in model.named_modules()]
    return [p for p in found if p is not None]


def output_layers(model: nn.Module) -> Modules:
    """Of the models inside: their rows may have an order, see ``one_order``."""
    from transformers import PreTrainedModel

    found = (m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel))
    return tuple(head for head in found if head is not None)


def _plan_of(name: str, module: nn.Module, has_mode: Modules, heads: Modules) -> Plan | None:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    if any(module is other for other in has_mode):
        return None
    if type(module) is nn.Linear:
        is_head = any(module is head for head in heads)
        return _plan(name, module, "linear", output_forward if is_head else linear_forward)
    if isinstance(module, nn.Embedding) and not (module.sparse or module.max_norm or module.scale_grad_by_freq):
        return _plan(name, module, "gather_rows", embedding_forward, when="on a GPU")
    if isinstance(module, nn.Dropout):
        return _plan(name, module, "a refusal in training", dropout_forward)
    if has_angles(module):
        return _plan_of_angles(name, module)
    if isinstance(module, PreTrainedModel):
        return _plan(name, module, "the mode", forward_in_mode)
    if isinstance(module, GradientCheckpointingLayer):  # a reentrant checkpoint calls it in backward, outside of models
        return _plan(name, module, "the mode", layer_in_mode)
    return None


def _plan(name: str, module: nn.Module, by: str, forward: Callable[[type], Callable[..., Any]], when: str = "") -> Plan:
    if "forward" in vars(module):
        refuse(name or "the model", "its forward has been replaced by something else")
    return Plan(Change(name, KIND, by=by, when=when), lambda: replace_forward(module, Recipe(forward)))


def has_angles(module: nn.Module) -> bool:
    return "RotaryEmbedding" in type(module).__name__


def _plan_of_angles(name: str, module: Any) -> Plan:
    kinds = getattr(module, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if kind in ("dynamic", "longrope"):
            refuse(name, f"the frequencies of {kind} rotations depend on the longest row of a batch")
    return _plan(name, module, "cosine and sine of one function", angles_forward)


def linear_forward(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:  # the name that nn.Linear has
        with ki.numerics("invariant"):  # also where somebody calls the layer alone
            return ki.linear(input, self.weight, self.bias)

    return forward


def output_forward(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        with ki.numerics("invariant"):
            rows = one_order.rows_in_order(self, input)
            return one_order.product_in_order(lambda x: ki.linear(x, self.weight, self.bias), input, rows)

    return forward


def embedding_forward(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Tensor:  # one of positions may have others
        if not self.weight.is_cuda or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        with ki.numerics("invariant"), _SteadyEmbedding():  # PyTorch's gradient differs from call to call
            return base.forward(self, *args, **kwargs)

    return forward


class _SteadyEmbedding(TorchFunctionMode):
    """The rows of an embedding by ``ki.gather_rows``, inside whatever else its forward does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            return embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **others: Any) -> Tensor:
    """``torch.nn.functional.embedding`` without its rarer options."""
    rows = ki.gather_rows(weight[:, None], input.flatten()).view(*input.shape, weight.shape[1])
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


def dropout_forward(base: type) -> Callable[..., Tensor]:
    def forward(self: nn.Dropout, input: Tensor) -> Tensor:
        if self.training and self.p > 0:
            refuse("dropout", f"p={self.p} in training: its mask follows an element's place in the batch")
        return input

    return forward


def angles_forward(base: type) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _OneFunction():
            return base.forward(self, *args, **kwargs)

    return forward


class _OneFunction(TorchFunctionMode):
    """Cosine and sine of a CPU by one vector function; on a GPU PyTorch's own do not depend on an element's place.

    An angle is one product, of a frequency and a place, which models write as matrices with one summed element.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[0].ndim > 1 and args[0].shape[-1] == args[1].shape[-2] == 1:
            return args[0] * args[1]
        ours = ANGLES.get(func)
        if ours is None or not args[0].is_cpu:
            return func(*args, **(kwargs or {}))
        return ours(args[0].double()).to(args[0].dtype)


ANGLES: dict[Any, Any] = {
    torch.cos: stable.cos, Tensor.cos: stable.cos, torch.sin: stable.sin, Tensor.sin: stable.sin
}  # fmt: skip


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def forward_in_mode(base: type) -> Callable[..., Any]:
    names = names_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            compiled.leave_trace()
            return compiled.around_layers(forward, self, *args, **kwargs)
        with ki.numerics("invariant"):
            kwargs = prepared(self, names, args, kwargs)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            if torch.compiler.is_compiling():
                return base.forward(self, *args, **kwargs)
            if one_order.is_innermost(self):
                found = one_order.run_in_order(base.forward, self, arguments)
                return base.forward(self, *args, **kwargs) if found is None else found
            with one_order.call_of_model(self, arguments):
                return base.forward(self, *args, **kwargs)

    return forward


def layer_in_mode(base: type) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ki.numerics("invariant"):
            return compiled.layer(base.forward, self, *args, **kwargs)

    return forward


def names_of(base: type) -> list[str]:
    """The parameters of a forward, without self."""
    return list(inspect.signature(base.forward).parameters)[1:]


def prepared(model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a model's forward in the mode.

    Positions count from the first token of a sequence, as ``generate`` counts them, where the caller gives none and a
    row is padded on the left.  A linear layer that was put into the model since ``apply`` is refused.
    """
    if torch.compiler.is_compiling():
        return kwargs
    if any(type(m) is nn.Linear for m in model.modules()):
        new = next(name for name, m in model.named_modules() if type(m) is nn.Linear)
        refuse(new, "it is a linear layer that was put there after apply: undo, and apply last")
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, tokens = given.get("attention_mask"), given.get("input_ids", given.get("inputs_embeds"))
    if "position_ids" not in names or given.get("position_ids") is not None or not isinstance(mask, Tensor):
        return kwargs
    if not isinstance(tokens, Tensor) or mask.ndim != 2 or bool(mask[:, :1].all()):
        return kwargs
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return kwargs | {"position_ids": positions}
