"""Kernels of the index inside one instance of a Hugging Face Transformers model, with a report and an undo."""

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import Mode, check_mode
from kernel_index.core.target import has_package
from kernel_index.integrations.extras import require
from kernel_index.integrations.hugging_face import (
    activation,
    attention,
    exact_ops,
    invariant,
    loss,
    mlp,
    norms,
    one_order,
    rope,
)
from kernel_index.integrations.hugging_face.change import Change, Kind, Plan, tried

__all__ = ["Change", "Report", "apply"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MARK = "_kernel_index_is_applied"
MARKING = threading.Lock()


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
        self._calls_left: dict[tuple[str, str], int] = {}
        self._calls_unordered: dict[tuple[str, str], int] = {}

    @property
    def replaced(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.replaced)

    @property
    def left(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if not c.replaced)

    @property
    def calls_left(self) -> dict[tuple[str, str], int]:
        """How many calls of a replaced attention layer went to the model's own, by module and reason."""
        return dict(self._calls_left) if self._model is None else self._counted(attention.NOTES)

    @property
    def calls_unordered(self) -> dict[tuple[str, str], int]:
        """With ``numerics="invariant"``: how many training calls of a decoder kept the caller's rows, so that gradients
        follow the packing, by module and reason."""
        return dict(self._calls_unordered) if self._model is None else self._counted(one_order.UNORDERED)

    def _counted(self, attribute: str) -> dict[tuple[str, str], int]:
        found = ((name, vars(m).get(attribute, {})) for name, m in self._model.named_modules())
        return {(name, why): count for name, notes in found for why, count in notes.items()}

    def undo(self) -> None:
        """Restore every forward and setting of the model; a second call does nothing."""
        self._calls_left, self._calls_unordered = self.calls_left, self.calls_unordered
        while self._undo:
            self._undo.pop()()
        if self._model is not None:
            for module in self._model.modules():
                vars(module).pop(attention.NOTES, None)
                vars(module).pop(attention.TRIED, None)
                vars(module).pop(MARK, None)
                vars(module).pop(one_order.KEEPS_ROWS, None)
                vars(module).pop(one_order.UNORDERED, None)
        self._model = None

    def __str__(self) -> str:
        """One line for each group of modules that differ only in their layer's number."""
        lines: dict[tuple[str, str, str], int] = {}
        for c in self.changes:
            said = ", ".join(filter(None, (c.by, c.when))) if c.replaced else f"left: {c.why}"
            key = (c.kind, _pattern(c.module), said)
            lines[key] = lines.get(key, 0) + 1
        calls: dict[tuple[str, str], int] = {}
        for (module, why), count in self.calls_left.items():
            calls[_pattern(module), why] = calls.get((_pattern(module), why), 0) + count
        said = [f"{k}: {m}{f' ({n})' if n > 1 else ''}: {said}" for (k, m, said), n in lines.items()]
        said += [f"attention: {m}: {n} calls went to the model's own: {why}" for (m, why), n in calls.items()]
        said += [
            f"numerics: {m or 'the model'}: {n} calls kept the caller's rows, which their gradients follow: {why}"
            for (m, why), n in self.calls_unordered.items()
        ]
        since = vars(self._model).get("forward") if self._model is not None else None
        if since is not None and any(c.kind == "loss" and c.replaced for c in self.changes):
            home = getattr(getattr(since, "__func__", since), "__globals__", {}).get("__name__", type(since).__name__)
            said.append(
                f"loss: the model: its forward was replaced since by {home}, which may compute a loss of its own"
            )
        return "\n".join(said)

    def __reduce__(self) -> tuple:
        # A copy tells what was done, and cannot undo it.
        return _report_of, (self.changes, self.calls_left, self.calls_unordered)

    def __repr__(self) -> str:
        return f"<Report: {len(self.replaced)} modules replaced, {len(self.left)} left>\n{self}"


Counts = dict[tuple[str, str], int]


def _report_of(changes: tuple[Change, ...], calls_left: Counts, calls_unordered: Counts | None = None) -> Report:
    report = Report(None, changes, [])
    report._calls_left, report._calls_unordered = calls_left, calls_unordered or {}
    return report


def _pattern(module: str) -> str:
    return re.sub(r"\b\d+\b", "*", module) or "the model"


def apply(
    model: Any,
    *,
    norms: bool = True,
    rope: bool = True,
    loss: bool = True,
    experts: bool = True,
    attention: bool = True,
    numerics: Mode = "ordinary",
) -> Report:
    """Replace modules of a Transformers model by kernels of the index: the same numbers, in less time and memory.

    Changes this instance alone.  A module is recognised by its values on a few inputs, called as the model calls it,
    not by its name; one that is not recognised is left as it is.  The report names for every module the function that
    replaced it, or the reason why none did.

    - ``norms``: RMS norms, with weights around one or around zero, by ``ki.fused_residual_add_rms_norm``, on a GPU by
      ``ki.gated_rms_norm``; norms of heads before a rotation together with it.  Under autocast the norm before linear
      layers is made in their dtype, once for all of them.
    - ``rope``: the rotary function that attention layers call, by ``ki.fused_rope_qk``.
    - ``loss``: the output layer and the causal loss, by ``ki.fused_linear_cross_entropy``.  While a call has labels,
      ``output.logits`` is computed only when something reads it, which must be before the weights change.
    - ``experts``: gated feed-forward layers (SwiGLU, GeGLU), by ``ki.fused_gated_activation``, on a GPU with the linear
      layer behind it, so that the activation is not kept; and squared ReLU, by ``ki.fused_relu_squared``.
    - ``attention``: by ``ki.attention`` through ``AttentionInterface``; documents, padding and windows become a
      ``ki.MaskContract``.  Every other call goes, with all its arguments and its mask, to the attention that the model
      had: a mask that no contract expresses, arguments that are not known, a static cache.  The report counts them.

    With ``numerics="invariant"`` every forward of the model runs in ``ki.numerics("invariant")``, its linear layers are
    ``ki.linear``, and log-probabilities of training, of any batch and packing, and of ``generate`` with its caches have
    the same bits; gradients do not follow the packing of a batch.  It is called on a few tokens: code of its own that
    is not exact is refused.  ``torch.compile`` of the model compiles its layers.  See guide 8.

    Inside ``torch.compile`` an ordinary model's norms, rotation and activations are traced as usual; loss and masked
    attention are the model's own, without a dense mask where a model makes a causal one and no other, and the call has
    neither a mask nor positions.

    Replacements last until ``Report.undo()``; weights, ``state_dict`` and ``save_pretrained`` are not affected, and a
    copy or a pickle of the model has them too.  The model gets a configuration of its own if it shared one.

    Args:
        model: a ``transformers.PreTrainedModel``, not patched yet, or a PEFT model around one.
        norms, rope, loss, experts, attention: whether modules of that kind are replaced.
        numerics: ``"ordinary"`` or ``"invariant"``.

    Returns:
        ``Report``.

    Raises:
        MissingExtra: transformers is not installed.
        TypeError: model is no ``PreTrainedModel``, or an option is no bool.
        ValueError: model has been changed by ``apply`` already, or numerics is another word.
        Ineligible: with ``numerics="invariant"``, a module has no invariant form; the message names it.

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
    loss: the model: fused_linear_cross_entropy, in calls with labels
    experts: model.layers.*.mlp: fused_gated_activation
    attention: model.layers.*.self_attn: attention
    >>> report.undo()
    """
    require("transformers", "hf")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of PEFT
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    check_mode("numerics", numerics)
    wanted = dict(zip(KINDS, (norms, rope, loss, experts, attention, numerics == "invariant"), strict=True))
    for name, value in wanted.items():
        checks.is_bool(name, value)
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    with MARKING:
        if any(MARK in vars(m) for m in parts):
            raise ValueError("model must be one that is not patched, got one with a report: undo() that first")
        for part in parts:
            vars(part)[MARK] = True
    undo: list[Callable[[], None]] = []
    report = None
    try:
        with torch.device("cpu"), ki.numerics("ordinary"):  # of the trials
            plans = [plan for kind in KINDS if wanted[kind] for plan in PLANNERS[kind](model, wanted)]
        for plan in plans:
            if plan.do is not None:
                undo.append(plan.do())
        if wanted["numerics"]:
            exact_ops.check(model)
            one_order.check(model)
        report = Report(model, (p.change for p in plans), undo)
    finally:
        if report is None:
            Report(model, (), undo).undo()
    return report


def _norms(model: nn.Module, wanted: dict[Kind, bool]) -> list[Plan]:
    """Norms of heads are done by the rotation where it is ours as well, and has the form."""
    together = wanted["rope"] and not wanted["numerics"]
    heads = {id(m) for m in _norms_of_heads(model)} if together else set()
    layers = {id(m) for m in _norms_of_layers(model)}
    return [
        tried(name, "norms", lambda name=name, m=m: norms.plan(name, m, id(m) in heads, id(m) in layers))
        for name, m in model.named_modules()
        if norms.is_candidate(m)
    ]


def _norms_of_heads(model: nn.Module) -> list[nn.Module]:
    rotating = [m for m in model.modules() if rope.names_in(m) and rope.plan("", m).change.replaced]
    return [child for m in rotating for child in m.children() if norms.is_candidate(child)]


def _norms_of_layers(model: nn.Module) -> list[nn.Module]:
    """Those that stand in an element of a list of layers, beside its other parts."""
    layers = [layer for m in model.modules() if isinstance(m, nn.ModuleList) for layer in m]
    return [child for layer in layers for child in layer.children() if norms.is_candidate(child)]


def _rope(model: nn.Module, wanted: dict[Kind, bool]) -> list[Plan]:
    found = [(name, m) for name, m in model.named_modules() if rope.names_in(m)]
    return [tried(name, "rope", lambda name=name, m=m: rope.plan(name, m)) for name, m in found]


def _feed_forward(model: nn.Module, wanted: dict[Kind, bool]) -> list[Plan]:
    layers = [(name, m) for name, m in model.named_modules() if mlp.is_candidate(m)]
    plans = [tried(name, "experts", lambda name=name, m=m: mlp.plan(name, m)) for name, m in layers]
    gated = {plan.change.module for plan in plans if plan.change.replaced}
    acts = [(n, a, act) for n, m in model.named_modules() if n not in gated for a, act in activation.activations_of(m)]
    unique = {id(act): (f"{n}.{a}", act) for n, a, act in acts}
    alone = [tried(name, "experts", lambda name=name, a=a: activation.plan(name, a)) for name, a in unique.values()]
    squared = {plan.change.module.rsplit(".", 1)[0] for plan in alone if plan.change.replaced}
    return [p for p in plans if p.change.replaced or p.change.module not in squared] + alone


def _attention(model: nn.Module, wanted: dict[Kind, bool]) -> list[Plan]:
    named = [(n, m) for n, m in model.named_modules() if attention.is_candidate(m)]
    return attention.plan(model, named, wanted["numerics"]) if named else []


def _loss(model: Any, wanted: dict[Kind, bool]) -> list[Plan]:
    return [tried("", "loss", lambda: loss.plan(model, wanted["numerics"]))]


def _numerics(model: Any, wanted: dict[Kind, bool]) -> list[Plan]:
    has_mode = (model, model.get_output_embeddings()) if wanted["loss"] and loss.why_not(model) is None else ()
    return invariant.plans(model, has_mode)


PLANNERS: dict[Kind, Callable[[Any, dict[Kind, bool]], list[Plan]]] = {
    "norms": _norms,
    "rope": _rope,
    "loss": _loss,
    "experts": _feed_forward,
    "attention": _attention,
    "numerics": _numerics,
}

if has_package("transformers"):
    attention.register()
