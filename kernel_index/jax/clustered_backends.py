"""The backends of ``kernel_index.jax.clustered_sparse_attention``.

The table can be read without JAX, which is imported when a call is made.
"""

import functools
from typing import Any

from kernel_index.core.dispatch import Backend, always
from kernel_index.jax.clustered_contract import PHASES, ClusteredCall, pallas_not_worth, pallas_why_not


def _details(backend: str, call: ClusteredCall) -> tuple[tuple[str, Any], ...]:
    from kernel_index.jax.clustered_compiled import is_cached
    from kernel_index.jax.target import mode_of

    config, reason = call.config, call.reroute
    blocks = -(-call.k.shape[1] // config.block_size)
    return (
        ("path", "reroute_to_dense" if reason else "clustered"),
        ("reason", reason),
        ("phase_order", PHASES),
        ("scoring_backend", "none" if reason else backend),
        ("union_backend", "none" if reason or backend == "xla" else "xla"),
        ("attention_backend", backend),
        ("routing_is_stop_gradient", True),
        ("attention_is_differentiable", True),
        ("max_union_over_picks", min(config.query_tile_size * config.topk, blocks) / config.topk),
        ("mode", mode_of(call.q) if backend == "pallas" else "compiled"),
        ("mask_cache", "hit" if is_cached(backend, call) else "miss"),
    )


def _run(backend: str, call: ClusteredCall) -> Any:
    from kernel_index.jax.clustered_compiled import run_cached

    return run_cached(backend, call)


def _backend(name: str, why_not: Any, not_worth: Any = None) -> Backend:
    return Backend(name, why_not, functools.partial(_run, name), not_worth, functools.partial(_details, name))


JAX_BACKENDS = (_backend("pallas", pallas_why_not, pallas_not_worth), _backend("xla", always))
