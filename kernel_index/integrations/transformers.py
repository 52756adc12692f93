"""Kernels of the index inside one instance of a Hugging Face Transformers model, with a report and an undo."""

import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

from torch import nn

from kernel_index.core import checks
from kernel_index.integrations.extras import require
from kernel_index.integrations.hugging_face import activation, attention, loss, norms, rope
from kernel_index.integrations.hugging_face.change import Change, Kind, Plan

__all__ = ["Change", "Report", "apply"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MARK = "_kernel_index_is_applied"


class Report:
    """The result of ``apply``: ``changes`` has one ``Change`` for each examined module; ``undo()`` restores the model.

    >>> from kernel_index.integrations.transformers import Change, Report
    >>> report = Report(None, [Change("norm", "norms", by="fused_residual_add_rms_norm")], [])
    >>> print(report)
    norms: norm: fused_residual_add_rms_norm
    """

    def __init__(self, model: Any, changes: Iterable[Change], undo: list[Callable[[], None]]):
        self.changes = tuple(changes)
        self._model, self._undo = model, undo

    @property
    def replaced(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.replaced)

    @property
    def left(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if not c.replaced)

    def undo(self) -> None:
        """Restore every forward, hook and setting of the model; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        if self._model is not None:
            vars(self._model).pop(MARK, None)
        self._model = None

    def __str__(self) -> str:
        """One line for each group of modules that differ only in their layer's number."""
        lines: dict[tuple[str, str, str], int] = {}
        for c in self.changes:
            pattern = re.sub(r"\b\d+\b", "*", c.module) or "the model"
            said = c.by or f"left: {c.why}"
            lines[c.kind, pattern, said] = lines.get((c.kind, pattern, said), 0) + 1
        return "\n".join(f"{k}: {m}{f' ({n})' if n > 1 else ''}: {said}" for (k, m, said), n in lines.items())


def apply(
    model: Any,
    *,
    norms: bool = True,
    rope: bool = True,
    loss: bool = True,
    experts: bool = True,
    attention: bool = True,
) -> Report:
    """Replace modules of a Transformers model by kernels of the index: the same numbers, in less time and memory.

    Changes this instance alone, through its parameters and public hooks.  A module is recognised by its values on a few
    inputs, not by its name; one that is not recognised is left as it is.  The report names for every module the
    function that replaced it, or the reason why none did.

    - ``norms``: RMS norms, with weights around one or around zero, by ``ki.fused_residual_add_rms_norm``.
    - ``rope``: the rotary function that attention layers call, by ``ki.fused_rope_qk``.
    - ``loss``: the output layer and the causal loss, by ``ki.fused_linear_cross_entropy``.  While a call has labels,
      ``output.logits`` is computed only when something reads it, which must be before the weights change.
    - ``experts``: squared ReLU, by ``ki.fused_relu_squared``.
    - ``attention``: by ``ki.attention`` through ``AttentionInterface``; documents, padding and windows become a
      ``ki.MaskContract``.  A mask that it cannot express goes to PyTorch's attention, as a dense mask.  A
      padding position attends to nothing: its output, and a loss computed from it, differ.

    Inside ``torch.compile`` norms, rotation and activations are traced as usual; the loss is Transformers' own, and
    attention is PyTorch's with a dense mask.

    Replacements last until ``Report.undo()``; weights, ``state_dict`` and ``save_pretrained`` are not affected, and a
    deep copy of the model has them too.

    Args:
        model: a ``transformers.PreTrainedModel``, not patched yet.
        norms, rope, loss, experts, attention: whether modules of that kind are replaced.

    Returns:
        ``Report``.

    Raises:
        MissingExtra: transformers is not installed.
        TypeError: model is no ``PreTrainedModel``, or an option is no bool.
        ValueError: model has been changed by ``apply`` already.

    Source: extension points of Transformers 5: ``AttentionInterface``, ``AttentionMaskInterface``, ``loss_function``.

    >>> import torch, transformers, kernel_index as ki
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                                   num_attention_heads=2, num_key_value_heads=1)
    >>> report = ki.transformers.apply(transformers.LlamaForCausalLM(config))
    >>> print(report)  # doctest: +NORMALIZE_WHITESPACE
    norms: model.layers.*.input_layernorm: fused_residual_add_rms_norm
    norms: model.layers.*.post_attention_layernorm: fused_residual_add_rms_norm
    norms: model.norm: fused_residual_add_rms_norm
    rope: model.layers.*.self_attn: fused_rope_qk
    loss: the model: fused_linear_cross_entropy
    experts: model.layers.*.mlp.act_fn: left: the index has no kernel for SiLUActivation
    attention: model.layers.*.self_attn: attention
    >>> report.undo()
    """
    require("transformers", "hf")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    wanted = dict(zip(KINDS, (norms, rope, loss, experts, attention), strict=True))
    for name, value in wanted.items():
        checks.is_bool(name, value)
    if MARK in vars(model):
        raise ValueError("model must be one that is not patched, got one with a report: undo() that first")
    plans = [plan for kind in KINDS if wanted[kind] for plan in PLANNERS[kind](model)]
    undo: list[Callable[[], None]] = []
    for plan in plans:
        if plan.do is not None:
            undo.append(plan.do())
    vars(model)[MARK] = True
    return Report(model, (p.change for p in plans), undo)


def _of_each(module_of: Any) -> Callable[[nn.Module], list[Plan]]:
    def planner(model: nn.Module) -> list[Plan]:
        return [module_of.plan(name, m) for name, m in model.named_modules() if module_of.is_candidate(m)]

    return planner


def _rope(model: nn.Module) -> list[Plan]:
    return [rope.plan(name, m) for name, m in model.named_modules() if rope.names_in(m)]


def _activations(model: nn.Module) -> list[Plan]:
    found = ((f"{name}.{a}", act) for name, m in model.named_modules() for a, act in activation.activations_of(m))
    unique = {id(act): (name, act) for name, act in found}
    return [activation.plan(name, act) for name, act in unique.values()]


def _attention(model: nn.Module) -> list[Plan]:
    return attention.plan(model, [(n, m) for n, m in model.named_modules() if attention.is_candidate(m)])


PLANNERS: dict[str, Callable[[Any], list[Plan]]] = {
    "norms": _of_each(norms),
    "rope": _rope,
    "loss": lambda model: [loss.plan(model)],
    "experts": _activations,
    "attention": _attention,
}
