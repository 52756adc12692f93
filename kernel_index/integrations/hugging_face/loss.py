"""The loss of a causal language model, without its logits.

While a call has labels, the output layer returns ``LazyLogits``; the loss function, which Transformers allows
to replace, takes from them the operands of the fused loss.  A call without labels, as in ``generate``, is unchanged.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face.change import ALREADY, Change, Plan, replace_forward
from kernel_index.integrations.hugging_face.logits import LazyLogits

KIND = "loss"
WANTED = "_kernel_index_loss_is_wanted"


def plan(model: Any) -> Plan:
    why = why_not(model)
    if why is not None:
        return Plan(Change("", KIND, why=why))
    return Plan(Change("", KIND, by="fused_linear_cross_entropy"), lambda: _replace(model))


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
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return "the output layer is not a plain torch.nn.Linear"
    if "forward" in vars(head):
        return ALREADY
    return None


def _replace(model: Any) -> Any:
    head = model.get_output_embeddings()
    restore_head = replace_forward(head, _head_forward)
    before = model.register_forward_pre_hook(_before, with_kwargs=True)
    after = model.register_forward_hook(_after, with_kwargs=True, always_call=True)
    model.loss_function = causal_lm_loss

    def undo() -> None:
        before.remove()
        after.remove()
        restore_head()
        vars(head).pop(WANTED, None)
        del model._loss_function

    return undo


def _before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    labels = kwargs.get("labels")
    if labels is None and args:
        names = list(inspect.signature(model.forward).parameters)
        labels = dict(zip(names, args, strict=False)).get("labels")
    vars(model.get_output_embeddings())[WANTED] = labels is not None


def _after(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    vars(model.get_output_embeddings())[WANTED] = False


def _head_forward(self: nn.Linear, input: Tensor) -> Tensor:
    # Under torch.compile the product is traced as it is: lazy logits would hide it from the compiler.
    if vars(self).get(WANTED) and not torch.compiler.is_compiling():
        return LazyLogits.of(input, self.weight, self.bias)
    return nn.functional.linear(input, self.weight, self.bias)


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
        return ForCausalLMLoss(logits, *rest, **kwargs)
    factors = logits.factors()
    if factors is None or logits.shape[-1] != vocab_size:
        return ForCausalLMLoss(logits.values(), *rest, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total = ki.fused_linear_cross_entropy(
        logits.hidden.reshape(targets.shape[0], -1),
        logits.weight,
        targets,
        bias=logits.bias,
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
