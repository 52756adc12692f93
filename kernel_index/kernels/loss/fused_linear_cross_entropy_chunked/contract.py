"""Argument checks and backend eligibility of the chunked loss, and how large a chunk is."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, device_products, inductor, native, rules
from kernel_index.core.numerics import is_invariant

CHUNK_BYTES = 128 << 20
"""Budget of one chunk of logits.  Few large chunks read the weight seldom; see docs/decisions/0004-loss-chunks.md."""

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """What a call has beside its tensors.

    ``softcap`` 0 is none, ``vocab`` counts the rows of weight that take part, ``chunk_size`` 0 is the byte budget's;
    ``with_lse`` says that the log-sum-exp and the z-loss may be differentiated too.
    """

    ignore_index: int
    softcap: float
    logit_scale: float
    label_smoothing: float
    z_loss: float
    reduction: Reduction
    vocab: int
    chunk_size: int
    with_lse: bool = False


class CrossEntropyOutput(NamedTuple):
    """What ``fused_linear_cross_entropy_with_lse`` returns.

    ``loss`` is that of ``fused_linear_cross_entropy``.  ``lse`` is the log-sum-exp of each token's logits, in the shape
    of targets, 0 where they are ignored.  ``z_loss`` is the part of ``loss`` that the z-loss is, in its shape.

    >>> import torch, kernel_index as ki
    >>> call = torch.ones(2, 4), torch.zeros(8, 4), torch.tensor([3, -100])
    >>> ki.fused_linear_cross_entropy_with_lse(*call).lse
    tensor([2.0794, 0.0000])
    """

    loss: Tensor
    lse: Tensor
    z_loss: Tensor


class Call(NamedTuple):
    """A checked call, its tensors cast as autocast asks; weight and bias may be DTensors."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: Options


class StatsOptions(NamedTuple):
    """``softcap`` 0 is none; ``top_k`` 0 and ``top_p`` 1 do not truncate; ``vocab`` rows of weight are classes."""

    ignore_index: int
    softcap: float
    temperature: float
    vocab: int
    top_k: int
    top_p: float


class StatsCall(NamedTuple):
    """A checked call of ``token_stats``; weight and bias may be DTensors."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: StatsOptions


class TokenStats(NamedTuple):
    """What ``token_stats`` returns, in the shape of targets; ``predicted`` is int64, the others are differentiable.

    >>> import torch, kernel_index as ki
    >>> ki.token_stats(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3])).log_prob
    tensor([-1.3863])
    """

    log_prob: Tensor
    entropy: Tensor
    log_support: Tensor
    predicted: Tensor


def check(
    hidden: Any,
    weight: Any,
    targets: Any,
    bias: Any,
    *,
    ignore_index: Any,
    softcap: Any,
    logit_scale: Any,
    chunk_size: Any,
    valid_vocab: Any,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    reduction: Any = "none",
) -> Call:
    _check_tensors(hidden, weight, targets, bias)
    checks.is_int("ignore_index", ignore_index)
    checks.is_real("logit_scale", logit_scale)
    checks.is_probability("label_smoothing", label_smoothing)
    checks.is_real("z_loss", z_loss)
    if softcap is not None:
        checks.is_real("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
    if z_loss < 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if chunk_size is not None:
        checks.is_int("chunk_size", chunk_size, minimum=1)
    vocab = weight.shape[0]
    if valid_vocab is not None:
        checks.is_int("valid_vocab", valid_vocab, minimum=1)
        if valid_vocab > vocab:
            raise ValueError(f"valid_vocab must be at most the {vocab} rows of weight, got {valid_vocab}")
        vocab = valid_vocab
    checks.one_of("reduction", reduction, REDUCTIONS)
    options = Options(
        ignore_index=ignore_index,
        softcap=float(softcap or 0.0),
        logit_scale=float(logit_scale),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        reduction=reduction,
        vocab=vocab,
        chunk_size=chunk_size or 0,
    )
    _check_targets(targets, options)
    if checks.is_autocast(hidden.device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
    return Call(hidden, weight, targets, bias, options)


SMALLEST_TEMPERATURE = 2.0**-126
"""The smallest normal float32: below it a division by the temperature would be one by 0."""


def check_stats(call: Call, temperature: Any, top_k: Any, top_p: Any) -> StatsCall:
    """A call whose other arguments ``check`` has seen."""
    checks.is_real("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if top_k is not None:
        checks.is_int("top_k", top_k, minimum=1)
    if top_p is not None:
        checks.is_real("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    options = StatsOptions(
        ignore_index=call.options.ignore_index,
        softcap=call.options.softcap,
        temperature=max(float(temperature), SMALLEST_TEMPERATURE),
        vocab=call.options.vocab,
        top_k=0 if top_k is None or top_k >= call.options.vocab else top_k,
        top_p=1.0 if top_p is None else float(top_p),
    )
    return StatsCall(*call[:4], options)


def check_group(weight: Any, bias: Any, group: Any) -> None:
    """A weight that is spread over ``group`` is given as this process's rows."""
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    checks.is_floating("weight", weight)
    checks.has_rank("weight", weight, 2, "[V / processes, C]")
    if bias is not None:
        checks.is_floating("bias", bias)
        checks.has_shape("bias", bias, (weight.shape[0],), "[V / processes] =")
    if _is_distributed(weight):
        raise ValueError("group must be None for a weight that is a DTensor, which has its own")


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any) -> None:
    checks.is_floating("hidden", hidden)
    checks.is_floating("weight", weight)
    checks.is_tensor("targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if hidden.ndim < 1:
        raise ValueError(f"hidden must be [..., C], got shape {tuple(hidden.shape)}")
    checks.has_rank("weight", weight, 2, "[V, C]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, C] with C = {hidden.shape[-1]}, got shape {tuple(weight.shape)}")
    if not weight.shape[0]:
        raise ValueError(f"weight must have a row for at least one class, got shape {tuple(weight.shape)}")
    checks.has_shape("targets", targets, tuple(hidden.shape[:-1]), "shaped like hidden without its last dimension")
    checks.on_device("weight", weight, hidden, "hidden")
    checks.on_device("targets", targets, hidden, "hidden")
    if bias is not None:
        checks.is_floating("bias", bias)
        checks.has_shape("bias", bias, (weight.shape[0],), "[V] =")
        checks.on_device("bias", bias, hidden, "hidden")
    if not checks.is_autocast(hidden.device):
        checks.has_dtype("weight", weight, hidden.dtype, "like hidden outside of autocast")
        if bias is not None:
            checks.has_dtype("bias", bias, hidden.dtype, "like hidden outside of autocast")


def _check_targets(targets: Tensor, options: Options) -> None:
    """Where the values can be read without waiting for a device, a target outside the vocabulary is an error."""
    if not rules.host_readable(targets):
        return
    wrong = ((targets < 0) | (targets >= options.vocab)) & (targets != options.ignore_index)
    if wrong.any():
        raise ValueError(
            f"targets must be in [0, {options.vocab}) or {options.ignore_index} (ignore_index), "
            f"got {int(targets[wrong][0])}"
        )


def rows_per_chunk(hidden: Tensor, vocab: int, chunk_size: int = 0) -> int:
    """Tokens of a chunk of hidden [N, C]: all chunks about equal, none over ``chunk_size`` or, if 0, the byte budget.

    The budget is ``CHUNK_BYTES`` or half the weight's bytes, if that is more: the memory stays below that of the
    weight's gradient, and the weight is read a few times only.
    """
    tokens, width = hidden.shape
    budget = max(CHUNK_BYTES, vocab * width * hidden.element_size() // 2)
    most = chunk_size or max(1, budget // (vocab * hidden.element_size()))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def native_why_not(call: Call | StatsCall) -> str | None:
    return native.op_why_not(call.hidden, call.weight, call.bias)


def sharded_why_not(call: Call | StatsCall) -> str | None:
    if not _is_distributed(call.weight):
        return "needs a weight sharded over the vocabulary (a DTensor)"
    from torch.distributed.tensor import DTensor, Shard  # loaded already where there is a DTensor

    hidden, weight, bias = call.hidden, call.weight, call.bias
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        return "needs a weight sharded over the vocabulary on a mesh of one dimension"
    if isinstance(hidden, DTensor) and not all(p.is_replicate() for p in hidden.placements):
        return "needs hidden states that every process has in full"
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != weight.placements):
        return "needs a bias sharded like the weight"
    return None


def _is_distributed(weight: Tensor) -> bool:
    """Without importing torch.distributed, which takes longer than the rest of the index."""
    return type(weight) not in rules.PLAIN and hasattr(weight, "device_mesh")


def triton_why_not(call: Call) -> str | None:
    return rules.triton_why_not(call.hidden, call.weight, call.bias)


def stats_triton_why_not(call: StatsCall) -> str | None:
    if is_invariant():
        if call.hidden.is_cpu and (rule := native.machine_why_not()) is not None:
            return rule  # interpreted: its sums are those of C++
        return device_products.why_not(call.hidden, call.weight, call.bias)
    if call.options.top_k or call.options.top_p < 1:
        return "has no truncation by top_k or top_p"
    return rules.triton_why_not(call.hidden, call.weight, call.bias)


def triton_not_worth(call: Call | StatsCall) -> str | None:
    return rules.triton_not_worth(call.hidden)


def inductor_why_not(call: Call) -> str | None:
    return inductor.why_not(call.hidden, call.weight)


def inductor_not_worth(call: Call) -> str | None:
    logits = call.hidden.numel() // max(1, call.hidden.shape[-1]) * call.weight.shape[0]
    return inductor.TOO_SMALL if logits < 16 * inductor.MIN_ELEMENTS else None


def chunked_why_not(call: Call | StatsCall) -> str | None:
    return rules.plain_why_not(call.hidden, call.weight)
