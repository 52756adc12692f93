"""Attention, through the two registries of Transformers: one for the mask, one for the call.

A call that is not exactly one that ``ki.attention`` computes goes, whole, to the attention that the model had.
"""

import copy
import copyreg
import dis
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import rules
from kernel_index.core.numerics import is_invariant, needs_ordinary_numerics
from kernel_index.integrations.hugging_face import plain_causal
from kernel_index.integrations.hugging_face.change import RAISED, Change, Plan, agree, draw
from kernel_index.integrations.hugging_face.implementation import NAME, Implementation, own_implementation
from kernel_index.integrations.hugging_face.invariant import name_of, refuse
from kernel_index.integrations.hugging_face.lazy import Lazy, plain
from kernel_index.integrations.hugging_face.masks import DENSE, LOST_KEYS, LazyMask, contract_for

KIND = "attention"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
SETTING = "_attn_implementation"
EAGER = "eager_attention_forward"
DROPOUT = "attention_dropout is not 0, and the index's attention has no dropout"


def is_candidate(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and not any("Attention" in type(c).__name__ for c in module.children())


def plan(model: Any, named: list[tuple[str, nn.Module]], invariant: bool = False) -> list[Plan]:
    """One plan for each attention layer.  The first that can be replaced brings the configuration of them all.

    Ordinary plain calls inside ``torch.compile`` do without a mask.  Where no other attention may run, dropout is
    judged call by call: it is part of calls in training alone.
    """
    whole = why_not(model, invariant)
    reasons = {name: whole or why_not_layer(module) for name, module in named}
    foreign = {own_implementation_of(m) for n, m in named if reasons[n] is None} - set(DENSE)
    if foreign and any(reasons.values()):  # a layer that is left would not understand our masks
        reasons = {
            n: r or f"other layers are left, and {foreign.pop()} takes no dense mask" for n, r in reasons.items()
        }
    left = [module for name, module in named if reasons[name] is not None]
    plans, do = [], lambda: _replace(model, left, not invariant)
    for name, _ in named:
        why = reasons[name]
        if why is not None:
            plans.append(Plan(Change(name, KIND, why=why)))
        else:
            plans.append(Plan(Change(name, KIND, by="attention"), do))
            do = None
    return plans


def why_not(model: Any, invariant: bool) -> str | None:
    if not model._can_set_attn_implementation():
        return "the model has no exchangeable attention (AttentionInterface)"
    if not invariant and any(getattr(c, "attention_dropout", 0.0) for c in _configs(model)):
        return DROPOUT
    for module in model.modules():
        if hasattr(module, "get_input_embeddings") and _reads_the_setting(module):
            return "the model does different things for different names of its attention"
    return None


def why_not_layer(module: nn.Module) -> str | None:
    code = inspect.unwrap(type(module).forward).__code__
    if REGISTRY not in code.co_names or not hasattr(getattr(module, "config", None), SETTING):
        return "its forward does not use the AttentionInterface"
    if _reads_the_setting(module):
        return "its forward does different things for different names of its attention"
    if own_implementation_of(module) == "eager" and eager_of(module) is None:
        return "the eager attention that it has could not be found"
    return None


def _reads_the_setting(module: nn.Module) -> bool:
    """Whether the class's own code reads the name of the attention but to look it up."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith(("torch.", "transformers.modeling_utils")):
            break
        for function in vars(cls).values():
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is not None and code.co_name != "__init__":
                names = [i.argval for i in dis.get_instructions(code)]
                if names.count(SETTING) > names.count("get_interface"):
                    return True
    return False


def own_implementation_of(module: Any) -> str:
    setting = module.config._attn_implementation
    return getattr(setting, "own", setting) if setting != NAME else own_implementation(module.config)


def eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention that the module's forward gives to the registry as its default."""
    function = inspect.unwrap(type(module).forward)
    names = [n for n in function.__code__.co_names if n.endswith(EAGER)]
    return function.__globals__.get(names[0]) if len(names) == 1 else None


def _configs(model: Any) -> list[Any]:
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


def register() -> None:
    """Make ``attn_implementation="kernel_index"`` known to Transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, contract_for)


def _restored(own: str) -> str:
    """In a process that has loaded a patched model, and maybe nothing else of ours."""
    register()
    return Implementation.over(own)


copyreg.pickle(Implementation, lambda name: (_restored, (name.own,)))  # type: ignore[arg-type]


def _replace(model: Any, left: list[nn.Module], compiled: bool) -> Callable[[], None]:
    """Give the model, and no other that shares it, a configuration that names our attention.

    The layers that are left get one that names theirs.
    """
    register()
    ours, theirs = _Copies(lambda name: Implementation.over(name or "eager")), _Copies(lambda name: name)
    leave, undo = {id(m) for m in left}, []
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, SETTING):
            module.config = (theirs if id(module) in leave else ours).of(config)
            undo.append((module, config))
    forwards = plain_causal.replace(model) if compiled and not left else []

    def restore() -> None:
        for undo_forward in forwards:
            undo_forward()
        for module, config in undo:
            module.config = config
        ours.write_back()

    return restore


class _Copies:
    """Copies of configurations, one for each, parts included; ``name`` makes the new implementation from the old."""

    def __init__(self, name: Callable[[Any], Any]):
        self.name = name
        self.made: dict[int, tuple[Any, Any, dict[str, Any]]] = {}

    def of(self, config: Any) -> Any:
        if id(config) not in self.made:
            new = copy.copy(config)
            self.made[id(config)] = config, new, {}
            for key, part in vars(config).items():
                if hasattr(part, SETTING):
                    vars(new)[key] = self.of(part)
            new._attn_implementation_internal = self.name(config._attn_implementation)
            self.made[id(config)] = config, new, dict(vars(new))
        return self.made[id(config)][1]

    def write_back(self) -> None:
        """What was set on a copy since belongs to the original."""
        for config, new, first in self.made.values():
            for key, value in vars(new).items():
                if key not in first or first[key] is not value:
                    vars(config)[key] = value


BENIGN = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"}
    | {"logits_to_keep", "num_items_in_batch", "past_key_values", "seq_idx"}
)
"""Arguments that Transformers hands down to every attention, and that no attention computes with."""

OF_FLASH = frozenset(
    {"sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"}
)
"""Arguments that flash attention alone reads: eager and PyTorch's attention find the same in their mask."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``ki.attention`` in the signature of ``AttentionInterface``: query [B, H, T, D], result [B, T, H, Dv].

    What ours cannot take, or does not know, goes to the model's own attention with all its arguments.
    """
    query, key, value = plain(query), plain(key), plain(value)  # norms of heads, in a layer that rotates nothing
    named = {
        "dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap, "s_aux": s_aux, **kwargs
    }  # fmt: skip
    given = {n: v for n, v in named.items() if v is not None}
    if plain_causal.is_plain(attention_mask):
        if not plain_causal.is_faster_here(query):
            return own_attention(module, query, key, value, None, given)
        attention_mask = None
    why = why_not_call(module, query, key, value, attention_mask, given)
    if why is not None:
        if is_invariant():
            refuse(f"attention of {name_of(module)}", why)
        note(module, why)
        return own_attention(module, query, key, value, attention_mask, given)
    if isinstance(attention_mask, LazyMask):
        if attention_mask.request["kv_offset"]:  # generate makes masks of static caches outside of the model's forward
            needs_ordinary_numerics("attention", LOST_KEYS)
        mask = attention_mask.contract
    else:
        mask = _without_a_mask(module, query.shape[2], key.shape[2], is_causal)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = ki.attention(q, k, v, mask, scale=scaling, softcap=softcap or 0.0, sink=s_aux)
    if own_implementation(module.config) != "eager":
        return out, None
    return out, LazyWeights.of(module, query, key, value, attention_mask, given)


def why_not_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]
) -> str | None:
    """Why a call is not one that ``ki.attention`` computes, or None."""
    if given["dropout"]:
        return DROPOUT
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    own = own_implementation(module.config)
    known = {"dropout", "scaling", "is_causal", "softcap", "s_aux"} | BENIGN
    if own in DENSE:  # they do not read these
        known |= OF_FLASH
    unknown = sorted(n for n, v in given.items() if n not in known and (n, v) != ("output_attentions", False))
    if unknown:
        return f"is called with {', '.join(unknown)}"
    if mask is not None and (not isinstance(mask, LazyMask) or mask.made):
        return "its mask is one that no MaskContract expresses, or that the model has read"
    if mask is None and own not in DENSE:
        return f"{own} may find documents where no mask is given"
    if not _fits(query, key, value):
        return "its tensors are not [B, H, T, D] of one dtype and batch size"
    if own == "eager":
        if torch.compiler.is_compiling() or rules.inside_functorch():
            return "eager attention inside torch.compile or torch.func"
        return _tried(module, query, key, value, given)
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        return False
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        return False
    alike = query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type)
    return alike and query.dtype.is_floating_point


TRIED = "_kernel_index_eager_was_tried"


def _tried(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> str | None:
    """Whether the layer's eager attention is softmax attention as ``ki.attention`` computes it; once for each layer.

    It is called as the model calls it, on a few random values in float32.
    """
    if TRIED not in vars(module):
        vars(module)[TRIED] = _try(module, query, key, value, given)
    return vars(module)[TRIED]


def _try(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> str | None:
    eager, tokens = eager_of(module), 6
    if eager is None:
        return "the eager attention that it has could not be found"
    arguments = {n: v for n, v in given.items() if n not in BENIGN}
    try:
        with ki.numerics("ordinary"), torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            q, k, v = (
                draw(1, x.shape[1], tokens, x.shape[3], seed=20 + i).to(x.device)
                for i, x in enumerate((query, key, value))
            )
            allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
            additive = torch.zeros(1, 1, tokens, tokens, device=q.device)
            additive = additive.masked_fill(~allowed, torch.finfo(q.dtype).min)
            actual, _ = eager(module, q, k, v, additive, **arguments)
            wide_q, wide_k, wide_v = (x.transpose(1, 2).double() for x in (q, k, v))
            expected = ki.attention(
                wide_q,
                wide_k,
                wide_v,
                scale=given.get("scaling"),
                softcap=given.get("softcap") or 0.0,
                sink=given.get("s_aux"),
                backend="reference",
            )
    except RAISED as error:
        return f"its eager attention could not be tried: {type(error).__name__}"
    return None if agree(actual, expected) else "its eager attention computes something else"


def own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model had before, with the mask that it had."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = own_implementation(module.config)
    if isinstance(mask, LazyMask):
        mask = mask.for_implementation(own) if not mask.made else mask.values()
    function = eager_of(module) if own == "eager" else ALL_ATTENTION_FUNCTIONS[own]
    if own == "sdpa" and ("softcap" in given or "s_aux" in given):
        # A model that was loaded with our attention, and whose layers PyTorch's cannot serve.
        function = eager_of(module)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    if function is None:
        raise ValueError(f"{type(module).__name__} must have an eager attention for this call, got none that was found")
    return function(module, query, key, value, mask, **given)


def _without_a_mask(module: nn.Module, queries: int, keys: int, is_causal: bool | None) -> ki.MaskContract:
    """What no mask means: for eager attention all keys; for PyTorch's causal if the layer is, from the first key on."""
    if own_implementation(module.config) == "eager" or queries <= 1:
        return ki.MaskContract(causal=False)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return ki.MaskContract(causal, q_offset=0 if causal and queries != keys else None)


class LazyWeights(Lazy):
    """The weights of eager attention, [B, H, T, S], computed if something reads them (``output_attentions``)."""

    module: nn.Module
    mask: Any
    given: dict[str, Any]

    @staticmethod
    def of(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: Any) -> "LazyWeights":
        shape, same = (*query.shape[:3], key.shape[2]), {"module": module, "mask": mask, "given": given}
        return LazyWeights.wrap(shape, query.dtype, query.device, query, key, value, **same)

    def formula(self, *operands: Tensor) -> Tensor:
        query, key, value = operands
        weights = own_attention(self.module, query, key, value, self.mask, self.given)[1]
        assert weights is not None
        return weights


NOTES = "_kernel_index_calls_left"


def note(module: nn.Module, why: str) -> None:
    """Count a call that went to the model's own attention, for the report."""
    if not torch.compiler.is_compiling():
        counts = vars(module).setdefault(NOTES, {})
        counts[why] = counts.get(why, 0) + 1
