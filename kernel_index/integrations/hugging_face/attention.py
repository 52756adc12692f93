"""Attention, through the two registries of Transformers: one for the mask, one for the call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face.change import Change, Plan
from kernel_index.integrations.hugging_face.masks import Prepared, contract_for

KIND = "attention"
NAME = "kernel_index"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def is_candidate(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and not any("Attention" in type(c).__name__ for c in module.children())


def plan(model: Any, named: list[tuple[str, nn.Module]]) -> list[Plan]:
    """One plan for each attention layer.  The first that can be replaced replaces them all, as the registry does."""
    if not named:
        return []
    why = why_not(model)
    if why is not None:
        return [Plan(Change(name, KIND, why=why)) for name, _ in named]
    plans, do = [], lambda: _replace(model)
    for name, module in named:
        if _uses_the_registry(module):
            plans.append(Plan(Change(name, KIND, by="attention"), do))
            do = None
        else:
            plans.append(Plan(Change(name, KIND, why="its forward does not use the AttentionInterface")))
    return plans


def why_not(model: Any) -> str | None:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    if not model._can_set_attn_implementation():
        return "the model has no exchangeable attention (AttentionInterface)"
    for config in configs.values():
        if getattr(config, "attention_dropout", 0.0):
            return "attention_dropout is not 0, and the index's attention has no dropout"
    return None


def _uses_the_registry(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and REGISTRY in code.co_names


def _replace(model: Any) -> Callable[[], None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, contract_for)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    model.set_attn_implementation(NAME)

    def undo() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return undo


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Prepared | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``ki.attention`` in the signature of ``AttentionInterface``: query [B, H, T, D], result [B, T, H, Dv].

    A mask that no contract expresses arrives as a dense tensor.  It goes, like a position bias or a paged cache, to
    PyTorch's attention as Transformers calls it.
    """
    if dropout:
        raise ValueError(f"dropout must be 0 for the index's attention, got {dropout}")
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None or isinstance(attention_mask, Tensor):
        return _as_before(module, query, key, value, attention_mask, scaling, is_causal, softcap, s_aux, kwargs)
    if attention_mask is None:
        mask = _without_a_mask(module, query.shape[2], key.shape[2], is_causal, kwargs.get("sliding_window"))
    else:
        mask = attention_mask.contract
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return ki.attention(q, k, v, mask, scale=scaling, softcap=softcap or 0.0, sink=s_aux), None


def _without_a_mask(
    module: nn.Module, queries: int, keys: int, is_causal: bool | None, window: int | None
) -> ki.MaskContract:
    """No mask means causal if the layer is, aligned with the first key; a single query sees all keys."""
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bounds = (window - 1, 0) if causal and window is not None else (None, None)
    return ki.MaskContract(causal, bounds, q_offset=0 if causal and queries != keys else None)


def _as_before(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
    sink: Tensor | None,
    rest: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sink is not None:
        raise ValueError(
            "attention_mask must be one that a MaskContract expresses where the layer has sinks, got another"
        )
    return sdpa_attention_forward(
        module, query, key, value, mask, scaling=scaling, is_causal=is_causal, softcap=softcap, **rest
    )
