"""Linear projection and cross-entropy without the logits: memory bounded by a chunk, forward and backward."""

from typing import Any, Literal

from torch import Tensor

from kernel_index.core import device_products, numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.numerics import Recipe
from kernel_index.core.products import PRODUCT
from kernel_index.core.stable import ELEMENTWISE, ON_A_GPU
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import contract
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.reference import (
    linear_cross_entropy_reference,
    token_stats_reference,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op import (
    linear_cross_entropy_chunked,
    linear_cross_entropy_inductor,
    linear_cross_entropy_native,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op_sliced import linear_cross_entropy_triton
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op_stats import (
    token_stats_chunked,
    token_stats_native,
)
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.torch_op_stats_sliced import token_stats_triton


def _sharded(call: contract.Call) -> contract.CrossEntropyOutput:
    """Imported at the call: torch.distributed takes longer to load than the rest of the index."""
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import vocab_parallel

    return vocab_parallel.linear_cross_entropy_sharded(call)


def _stats_sharded(call: contract.StatsCall) -> contract.TokenStats:
    from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import vocab_parallel

    return vocab_parallel.token_stats_sharded(call)


LOSS = Recipe(f"loss 2: float32 logits by {PRODUCT.text}; their softmax by {ELEMENTWISE.text}")

LOSS_ON_A_GPU = Recipe(
    f"loss on a GPU 2: float32 logits by {device_products.PRODUCT.text}; their softmax by {ON_A_GPU.text}"
)

LossBackend = Literal["auto", "sharded", "triton", "native", "inductor", "chunked", "reference"]

BACKENDS = (
    Backend("sharded", contract.sharded_why_not, _sharded),
    Backend(
        "triton",
        contract.triton_why_not,
        linear_cross_entropy_triton,
        contract.triton_not_worth,
        invariant=LOSS_ON_A_GPU,
    ),
    Backend("native", contract.native_why_not, linear_cross_entropy_native, numerics.not_worth, invariant=LOSS),
    Backend("inductor", contract.inductor_why_not, linear_cross_entropy_inductor, contract.inductor_not_worth),
    Backend("chunked", contract.chunked_why_not, linear_cross_entropy_chunked),
    Backend("reference", always, linear_cross_entropy_reference),
)

StatsBackend = Literal["auto", "sharded", "triton", "native", "chunked", "reference"]

STATS_BACKENDS = (
    Backend("sharded", contract.sharded_why_not, _stats_sharded),
    Backend(
        "triton", contract.stats_triton_why_not, token_stats_triton, contract.triton_not_worth, invariant=LOSS_ON_A_GPU
    ),
    Backend("native", contract.native_why_not, token_stats_native, numerics.not_worth, invariant=LOSS),
    Backend("chunked", contract.chunked_why_not, token_stats_chunked),
    Backend("reference", always, token_stats_reference),
)


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: contract.Reduction = "mean",
    chunk_size: int | None = None,
    valid_vocab: int | None = None,
    backend: LossBackend = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` in the memory of a chunk of logits, forward and backward.

    Per token, with ``z = cap(logit_scale · (W·h + bias))`` and ``cap(z) = softcap · tanh(z / softcap)``::

        lse  = log Σ_v exp(z_v)
        loss = (1 − s)·(lse − z_target) + s·(lse − mean_v z_v) + z_loss·lse²        s = label_smoothing

    Softmax, log-sum-exp and every sum over tokens are float32 at least.  The two matrix products run in the inputs'
    dtype; on a CPU a bfloat16 product is rounded to bfloat16 before the softmax reads it.  On a CPU ``mean`` and
    ``sum`` form the gradients in the forward pass (three products for each chunk) and only scale them in backward, out
    of place; ``none`` forms the logits again there (four products).  For a GPU see ``chunk_size``.  A second derivative
    raises.

    Args:
        hidden: [..., C], floating.
        weight: [V, C] of hidden's dtype.  Under autocast both are cast as ``F.linear`` casts them.  A DTensor sharded
            over V (``Shard(0)``) makes the loss vocabulary-parallel: every process of its mesh calls with the same
            hidden and targets, gets the same loss and gradient of hidden, and the gradient of its own rows; only row
            maxima and sums are exchanged.
        targets: [...], int64 or int32, class indices or ``ignore_index``.
        bias: [V] or None.
        ignore_index: targets with this value cost nothing, have no gradient, and are not counted by ``mean``.
        softcap: positive, or None for none.
        logit_scale: factor of the logits.
        label_smoothing: fraction of the target mass spread evenly over the vocabulary, 0 to 1.
        z_loss: coefficient of the squared log-sum-exp.
        reduction: ``"mean"`` over the tokens not ignored (0, with zero gradients, if there is none, where PyTorch gives
            NaN), ``"sum"`` or ``"none"``.
        chunk_size: the memory to hold, in tokens whose logits may exist at once, ``bytes // (V · element size)``.
            By default what 128 MiB of logits hold, or half the weight's bytes if that is more, in chunks of about
            equal size.  On a GPU logits that wait for backward save a product of four.  Up to as many tokens as there
            are channels wait in the memory of the weight's gradient, by default as many as fit, for each call whose
            backward is still to come; a larger number takes memory of its own, up to all tokens.  Inside a checkpoint
            no logits wait; nor do they where hidden is float32 and the number is below that of the tokens.
        valid_vocab: only this many first rows of weight are classes; the rest is padding without gradient.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A scalar, or the shape of targets for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument breaks its rule; a target on the CPU is outside the vocabulary.
        Ineligible: the named backend cannot run this call.

    Source: the chunked formulation follows Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.

    >>> import torch, kernel_index as ki
    >>> hidden, weight = torch.ones(2, 3, 4), torch.eye(8, 4)
    >>> ki.fused_linear_cross_entropy(hidden, weight, torch.zeros(2, 3, dtype=torch.int64))
    tensor(1.6996)
    """
    call = contract.check(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        chunk_size=chunk_size,
        valid_vocab=valid_vocab,
    )
    return choose("fused_linear_cross_entropy", BACKENDS, backend, call).run(call).loss


def fused_linear_cross_entropy_with_lse(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: contract.Reduction = "mean",
    chunk_size: int | None = None,
    valid_vocab: int | None = None,
    backend: LossBackend = "auto",
) -> contract.CrossEntropyOutput:
    """The loss, with the log-sum-exp of each token's logits and the part of the loss that the z-loss is.

    With ``z`` the logits as ``fused_linear_cross_entropy`` has them, after scale, softcap and ``valid_vocab``::

        lse    = log Σ_v exp(z_v)                        0 for an ignored token, without a gradient
        z_loss = reduction(z_loss · lse²)                loss includes it

    ``loss`` has the bits of ``fused_linear_cross_entropy``.  All three are differentiable; one that is not used costs
    no pass.  With ``mean`` and ``sum``, a backward through ``lse`` or ``z_loss`` forms the logits of each chunk once
    more, and hidden and weight are kept for it.

    Args:
        hidden: [..., C].
        weight: [V, C], or a DTensor sharded over V.
        targets: [...] class indices or ``ignore_index``.
        bias: [V] or None.
        ignore_index: targets that cost nothing.
        softcap: positive, or None.
        logit_scale: factor of the logits.
        label_smoothing: fraction of the target mass spread evenly over the vocabulary.
        z_loss: coefficient of the squared log-sum-exp.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, of ``loss`` and ``z_loss``; ``lse`` is of each token always.
        chunk_size: tokens per chunk.
        valid_vocab: rows of weight that are classes.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``CrossEntropyOutput(loss, lse, z_loss)``: scalars, or the shape of targets for ``"none"``; ``lse`` has the
        shape of targets.  All are float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, Ineligible: as ``fused_linear_cross_entropy``.

    Source: de Brébisson and Vincent, "The Z-loss", 2016, for the squared log-sum-exp.

    >>> import torch, kernel_index as ki
    >>> call = torch.ones(2, 4), torch.zeros(8, 4), torch.tensor([3, -100])
    >>> loss, lse, z_loss = ki.fused_linear_cross_entropy_with_lse(*call, z_loss=0.1)
    >>> lse
    tensor([2.0794, 0.0000])
    >>> z_loss
    tensor(0.4324)
    """
    call = contract.check(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        chunk_size=chunk_size,
        valid_vocab=valid_vocab,
    )
    call = call._replace(options=call.options._replace(with_lse=True))
    return choose("fused_linear_cross_entropy_with_lse", BACKENDS, backend, call).run(call)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    valid_vocab: int | None = None,
    backend: LossBackend = "auto",
) -> Tensor:
    """Log-probability of each target under the linear head, in the memory of a chunk; differentiable.

    ``log softmax(cap(logit_scale · (W·h + bias)))[target]``, and 0 where the target is ``ignore_index``.  Arguments,
    errors and precision are those of ``fused_linear_cross_entropy``.

    Args:
        hidden: [..., C].
        weight: [V, C].
        targets: [...] class indices or ``ignore_index``.
        bias: [V] or None.
        ignore_index: targets without a log-probability.
        softcap: positive, or None.
        logit_scale: factor of the logits, 1 / temperature.
        chunk_size: tokens per chunk.
        valid_vocab: rows of weight that are classes.
        backend: ``"auto"`` or a backend's name.

    Returns:
        The shape of targets, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, Ineligible: as ``fused_linear_cross_entropy``.

    Source: the definition of log-softmax.

    >>> import torch, kernel_index as ki
    >>> ki.token_log_probs(torch.ones(1, 4), torch.zeros(8, 4), torch.tensor([3]))
    tensor([-2.0794])
    """
    call = contract.check(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_size=chunk_size,
        valid_vocab=valid_vocab,
    )
    losses = choose("token_log_probs", BACKENDS, backend, call).run(call).loss
    return 0.0 - losses  # not -losses: an ignored target gives 0, not -0


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    top_k: int | None = None,
    top_p: float | None = None,
    group: Any = None,
    backend: StatsBackend = "auto",
) -> contract.TokenStats:
    """What a policy loss reads of each token: log-probability, entropy, mass of the sampler's support, argmax.

    With ``x = cap(W·h + bias)``, ``cap(x) = softcap · tanh(x / softcap)``, and the classes that a sampler keeps::

        p           = softmax(x / temperature)
        log_prob    = log p[target]
        entropy     = −Σ_v p_v · log p_v                  of the untruncated distribution
        log_support = log Σ_{v kept} p_v                  0 without top_k and top_p
        predicted   = argmax_v x_v                        the smallest index among equals

    So ``log_prob − log_support`` is the log-probability over the truncated support, for a target in it.  Kept are the
    ``top_k`` largest logits, and of those, by falling logit, each one before which their renormalised probability is
    below ``top_p``; among equal logits the smaller index comes first.  ``lm.generate`` samples by the same rule.

    No more than a chunk of logits is ever held, forward and backward; backward forms them once more.  ``log_prob``,
    ``entropy`` and ``log_support`` are differentiable in hidden, weight and bias, for the classes kept as they are.
    For a target that is ``ignore_index`` these three are 0, without a gradient; ``predicted`` is the argmax there too.
    Without softcap ``log_prob`` is that of ``token_log_probs`` with ``logit_scale = 1 / temperature``; with one, the
    temperature divides the capped logits here, as a sampler does, where ``logit_scale`` multiplies before the cap.
    In invariant numerics it has the bits of ``token_log_probs``, with a softcap at temperature 1 alone.

    Args:
        hidden: [..., C], floating.
        weight: [V, C] of hidden's dtype, or a DTensor sharded over V.
        targets: [...], int64 or int32, class indices or ``ignore_index``.
        bias: [V] or None.
        temperature: positive.
        softcap: positive, or None.
        valid_vocab: rows of weight that are classes, counted over all processes.
        ignore_index: targets without statistics.
        top_k: at least 1, or None to keep all.
        top_p: above 0 and at most 1, or None to keep all.
        group: a process group each of whose processes has equally many rows of weight, and bias, in the order of ranks;
            all give the same hidden and targets and get the same statistics.
        backend: ``"auto"`` or a backend's name.

    Returns:
        ``TokenStats(log_prob, entropy, log_support, predicted)``, each in the shape of targets: float32 (float64 for
        float64 inputs), and int64.

    Raises:
        TypeError, ValueError: an argument breaks its rule; a target on the CPU is outside the vocabulary.
        Ineligible: the named backend cannot run this call.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, for the truncation by ``top_p``.

    >>> import torch, kernel_index as ki
    >>> logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    >>> stats = ki.token_stats(torch.ones(1, 1), logits.T, torch.tensor([1]), top_k=2)
    >>> stats.log_prob.exp(), (stats.log_prob - stats.log_support).exp(), stats.predicted
    (tensor([0.2500]), tensor([0.3333]), tensor([0]))
    """
    if group is not None:
        contract.check_group(weight, bias, group)
        from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import vocab_parallel

        weight, bias = vocab_parallel.spread_over(group, weight, bias)
    checked = contract.check(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=1.0,
        chunk_size=None,
        valid_vocab=valid_vocab,
    )
    call = contract.check_stats(checked, temperature, top_k, top_p)
    return choose("token_stats", STATS_BACKENDS, backend, call).run(call)
