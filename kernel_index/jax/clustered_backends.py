"""Which backends ``kernel_index.jax.clustered_sparse_attention`` has, and their rules; imports JAX at the call."""

from typing import Any

from kernel_index.core.dispatch import Backend, always
from kernel_index.jax.attention_backends import mode_of, pallas_not_worth, pallas_why_not

PHASES = ("scoring", "union", "attention")
COVERED = "topk_covers_all_blocks"


def clustered_pallas_why_not(q: Any, k: Any, v: Any, config: Any, *rest: Any) -> str | None:
    if config.block_size % 8 or config.query_tile_size % 8:
        return "needs a block size and a query tile size that are multiples of 8"
    return pallas_why_not(q, k, v, *rest)


def reroute_of(k: Any, config: Any) -> str:
    """Why this call needs no picks: as many as there are blocks means all of them."""
    return COVERED if config.topk >= -(-k.shape[1] // config.block_size) else ""


def _details(backend: str) -> Any:
    def details(q: Any, k: Any, v: Any, config: Any, mask: Any, *_: Any) -> tuple[tuple[str, Any], ...]:
        from kernel_index.jax.clustered import is_cached

        blocks = -(-k.shape[1] // config.block_size)
        reason = reroute_of(k, config)
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
            ("mode", mode_of(q) if backend == "pallas" else "compiled"),
            ("mask_cache", "hit" if is_cached(backend, q, config, mask) else "miss"),
        )

    return details


def _run(backend: str) -> Any:
    def run(*call: Any) -> Any:
        from kernel_index.jax.clustered import run_cached

        return run_cached(backend, *call)

    return run


JAX_BACKENDS = (
    Backend("pallas", clustered_pallas_why_not, _run("pallas"), pallas_not_worth, _details("pallas")),
    Backend("xla", always, _run("xla"), details=_details("xla")),
)
