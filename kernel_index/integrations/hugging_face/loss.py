"""The loss of a causal language model, without its logits.

While a call has labels, the output layer returns ``LazyLogits``; the loss function, which Transformers allows
to replace, takes from them the operands of the fused loss.  A call without labels, as in ``generate``, is unchanged.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core.numerics import needs_ordinary_numerics
from kernel_index.integrations.hugging_face import compiled
from kernel_index.integrations.hugging_face.change import ALREADY, Change, Plan, Recipe, replace_forward
from kernel_index.integrations.hugging_face.invariant import names_of, prepared
from kernel_index.integrations.hugging_face.lazy import is_observed
from kernel_index.integrations.hugging_face.logits import LazyLogits, product
from kernel_index.integrations.hugging_face.one_order import call_of_model, product_in_order, rows_in_order

KIND = "loss"
WANTED: ContextVar[nn.Module | None] = ContextVar("kernel_index_head_of_a_call_with_labels", default=None)


def plan(model: Any, invariant: bool = False) -> Plan:
    """``invariant``: both forwards run in ``numerics("invariant")``."""
    why = why_not(model)
    if why is not None:
        return Plan(Change("", KIND, why=why))
    when = "in calls with labels"
    return Plan(Change("", KIND, by="fused_linear_cross_entropy", when=when), lambda: _replace(model, invariant))


def why_not(model: Any) -> str | None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if head is None:
        return "the model has no output layer"
    if "_loss_function" in vars(model):
        return "the model has a loss function of its own"
    if "labels" not in inspect.signature(model.forward).parameters:
        return "the model's forward takes no labels"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss is not that of a causal language model"
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        return "its forward does not call its loss_function"
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return "the output layer is not a plain torch.nn.Linear"
    if "forward" in vars(head) or "forward" in vars(model):
        return ALREADY
    return None


def _replace(model: Any, invariant: bool) -> Any:
    head, settings = model.get_output_embeddings(), (True,) if invariant else ()
    undo_head = replace_forward(head, Recipe(head_forward, settings))
    undo_model = replace_forward(model, Recipe(model_forward, settings))
    model.loss_function = causal_lm_loss

    def undo() -> None:
        undo_model()
        undo_head()
        if vars(model).get("_loss_function") is causal_lm_loss:
            del model._loss_function

    return undo


def model_forward(base: type, invariant: bool = False) -> Callable[..., Any]:
    """The model's own forward, during which its head knows whether there are labels.

    A forward and not a hook: adapters call ``model.forward``, which runs no hooks.
    """
    names = names_of(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not invariant:
            return with_labels(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            compiled.leave_trace()
            return compiled.around_layers(forward, self, *args, **kwargs)
        with ki.numerics("invariant"):
            kwargs = prepared(self, names, args, kwargs)
            with call_of_model(self, dict(zip(names, args, strict=False)) | kwargs):
                return with_labels(self, *args, **kwargs)

    def with_labels(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        labels = kwargs.get("labels", dict(zip(names, args, strict=False)).get("labels"))
        token = WANTED.set(None if labels is None else self.get_output_embeddings())
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            WANTED.reset(token)

    return forward


def head_forward(base: type, invariant: bool = False) -> Callable[..., Tensor]:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        # Under torch.compile the product is traced as it is: lazy logits would hide it from the compiler.
        # A hook on the head, as sharding puts there, sees an ordinary tensor, and may free the weight after it.
        if not torch.compiler.is_compiling() and WANTED.get() is self and not is_observed(self):
            return LazyLogits.of(input, self.weight, self.bias, invariant, rows_in_order(self, input))
        rows = rows_in_order(self, input) if invariant else None
        return product_in_order(lambda x: product(x, self.weight, self.bias, invariant), input, rows)

    return forward


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of ``transformers``' ``ForCausalLMLoss``, computed from hidden states if the logits are lazy.

    The loss of token t is that of predicting label t + 1, averaged over the labels that are not ``ignore_index``, or
    summed and divided by ``num_items_in_batch``.  Where no label counts it is 0, where PyTorch's mean is NaN.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    rest = (labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
    if not isinstance(logits, LazyLogits):
        needs_ordinary_numerics("the loss", "it was given logits that have been computed")
        return ForCausalLMLoss(logits, *rest, **kwargs)
    factors = logits.factors()
    targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    fits = logits.shape[-1] == vocab_size and logits.shape[:-1].numel() == targets.shape[0]
    if logits.made or factors is None or not fits:
        needs_ordinary_numerics("the loss", "its logits are not those of the output layer alone")
        return ForCausalLMLoss(logits.values(), *rest, **kwargs)
    hidden, weight, bias = logits.factors_of_product()
    hidden = hidden.flatten(0, -2)
    if logits.rows is not None:  # without padding, which has no labels there
        hidden, targets = hidden.index_select(0, logits.rows), targets[logits.rows]
    total = ki.fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        softcap=factors.softcap,
        logit_scale=factors.scale,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
