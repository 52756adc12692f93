"""A tensor whose values are computed when something reads them: what a model hands from one module to another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Lazy(Tensor):
    """Shape, dtype and device are known; ``formula(*operands)`` gives the values.

    An operation that ``record`` knows gives another lazy tensor.  Every other one is done on the values, which are
    computed once: so code that does not know of lazy tensors sees an ordinary one.  Code below Python, as
    ``autograd.Function.apply``, sees a tensor with a gradient: its backward pass is that of the formula.
    """

    formula: Callable[..., Tensor]  # a method of the subclass
    operands: tuple[Tensor, ...]
    made: list[Tensor]
    grad_was_on: bool

    @classmethod
    def wrap(cls, shape: Any, dtype: torch.dtype, device: torch.device, *operands: Tensor, **attributes: Any) -> Any:
        """``attributes`` say what the formula is; they hold no lazy tensor."""
        blank = cls._blank(shape, dtype, device, attributes)
        lazy = _Tracked.apply(_Recipe(cls, shape, dtype, device, attributes), *operands) if operands else blank
        lazy.operands, lazy.made, lazy.grad_was_on = operands, [], torch.is_grad_enabled()
        return lazy

    @classmethod
    def _blank(cls, shape: Any, dtype: torch.dtype, device: torch.device, attributes: dict[str, Any]) -> Any:
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        vars(lazy).update(attributes)
        return lazy

    def check(self) -> None:
        """Raise ``RuntimeError`` if the values can no longer be computed."""
        if any(x.numel() > 0 and x.untyped_storage().nbytes() == 0 for x in self.operands if not x.is_meta):
            raise RuntimeError(f"{type(self).__name__} must be read before its operands are freed: it is computed late")

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on this tensor without its values, or ``NotImplemented``."""
        return NotImplemented

    def values(self) -> Tensor:
        """An ordinary tensor, computed at the first call."""
        if not self.made:
            self.check()
            with torch.set_grad_enabled(self.grad_was_on):
                self.made.append(self.formula(*self.operands))
        return self.made[0]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # Inside the forward of an autograd.Function gradients are off: a formula would go around its backward pass.
        if isinstance(first, Lazy) and not first.made and first.grad_was_on == torch.is_grad_enabled():
            found = first.record(func, tuple(args), kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(plain, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd: the operation is done on the values, and the gradient is that of ``_Tracked``."""
        args, kwargs = tree_map(lambda x: x.values().detach() if isinstance(x, Lazy) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def plain(x: Tensor) -> Tensor:
    """The tensor itself, or the values of a lazy one."""
    return x.values() if isinstance(x, Lazy) else x


class _Recipe(NamedTuple):
    cls: type[Lazy]
    shape: Any
    dtype: torch.dtype
    device: torch.device
    attributes: dict[str, Any]


class _Tracked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *operands: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*operands)
        return recipe.cls._blank(*recipe[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        operands = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.enable_grad():
            values = ctx.recipe.cls._blank(*ctx.recipe[1:]).formula(*operands)
        wanted = [x for x in operands if x.requires_grad]
        found = iter(torch.autograd.grad(values, wanted, grad, allow_unused=True))
        return None, *(next(found) if x.requires_grad else None for x in operands)


METADATA = frozenset(
    {getattr(Tensor, n).__get__ for n in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta")}
    | {getattr(Tensor, n).__get__ for n in ("requires_grad", "grad_fn", "is_leaf")}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.element_size}
)


def is_observed(module: torch.nn.Module) -> bool:
    """Whether somebody sees what the module returns before the code that we know: it has to be an ordinary tensor."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in hooks) or bool(torch.nn.modules.module._has_any_global_hook())
