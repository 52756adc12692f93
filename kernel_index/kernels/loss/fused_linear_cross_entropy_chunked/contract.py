"""Who may call the chunked loss, who may answer, and how large a chunk is."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core import checks, inductor, rules

CHUNK_BYTES = 128 << 20
"""Budget of one chunk of logits.  Few large chunks read the weight seldom; see docs/decisions/0004-loss-chunks.md."""

REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """The constants of a call; ``softcap`` 0 is none, ``vocab`` counts the rows of weight that take part."""

    ignore_index: int
    softcap: float
    logit_scale: float
    label_smoothing: float
    z_loss: float
    vocab: int


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
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


def check_options(
    weight: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int | None,
    valid_vocab: int | None,
) -> Options:
    checks.is_int("ignore_index", ignore_index)
    checks.is_real("logit_scale", logit_scale)
    checks.is_real("label_smoothing", label_smoothing)
    checks.is_real("z_loss", z_loss)
    if softcap is not None:
        checks.is_real("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
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
    return Options(
        ignore_index, float(softcap or 0.0), float(logit_scale), float(label_smoothing), float(z_loss), vocab
    )


def check_targets(targets: Tensor, options: Options) -> None:
    """Where the values can be seen without waiting for a device, a target outside the vocabulary is an error."""
    if torch.compiler.is_compiling() or rules.inside_functorch():
        return
    if type(targets) is not Tensor or targets.device.type != "cpu":
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


def sharded_why_not(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *_: object) -> str | None:
    if not _is_distributed(weight):
        return "needs a weight sharded over the vocabulary (a DTensor)"
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import vocab_parallel

    return vocab_parallel.rule(hidden, weight, bias)


def _is_distributed(weight: Tensor) -> bool:
    """Without importing torch.distributed, which takes longer than the rest of the index."""
    return type(weight) not in rules.PLAIN and hasattr(weight, "device_mesh")


def triton_why_not(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *_: object) -> str | None:
    return rules.triton_why_not(hidden, weight, bias)


def triton_not_worth(hidden: Tensor, *_: object) -> str | None:
    return rules.triton_not_worth(hidden)


def inductor_why_not(hidden: Tensor, weight: Tensor, *_: object) -> str | None:
    return inductor.why_not(hidden, weight)


def inductor_not_worth(hidden: Tensor, weight: Tensor, *_: object) -> str | None:
    logits = hidden.numel() // max(1, hidden.shape[-1]) * weight.shape[0]
    return "too small for a compiled region to pay" if logits < 16 * inductor.MIN_ELEMENTS else None


def chunked_why_not(hidden: Tensor, weight: Tensor, *_: object) -> str | None:
    if rules.inside_functorch():
        return "inside a torch.func transform"
    if not torch.compiler.is_compiling() and not {type(hidden), type(weight)} <= set(rules.PLAIN):
        return "needs plain tensors, not a tensor subclass"
    return None
