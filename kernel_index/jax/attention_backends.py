"""Which backends ``kernel_index.jax.attention`` has, and their rules; imports JAX at the call."""

from typing import Any

from kernel_index.core.dispatch import Backend, always

WIDEST = 256


def pallas_why_not(q: Any, k: Any, v: Any, *_: Any) -> str | None:
    from kernel_index.jax.target import platform_of

    if platform_of(q) not in ("tpu", "cpu"):
        return "needs a TPU (or a CPU, where Pallas is interpreted)"
    if q.dtype.name not in ("float32", "bfloat16"):
        return "needs float32 or bfloat16"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return "needs head sizes of at most 256"
    return None


def pallas_not_worth(q: Any, *_: Any) -> str | None:
    from kernel_index.jax.target import platform_of

    return "on a CPU Pallas is interpreted, which is slow" if platform_of(q) == "cpu" else None


def mode_of(q: Any, *_: Any) -> str:
    """How a Pallas kernel runs this call: ``compiled`` or ``interpreted``."""
    from kernel_index.jax.target import platform_of

    return "interpreted" if platform_of(q) == "cpu" else "compiled"


def _details(backend: str) -> Any:
    def details(q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> tuple[tuple[str, Any], ...]:
        from kernel_index.jax.interval_attention import is_cached

        mode = mode_of(q) if backend == "pallas" else "compiled"
        return ("mode", mode), ("mask_cache", "hit" if is_cached(backend, q, mask, rest[-1]) else "miss")

    return details


def _run(backend: str) -> Any:
    def run(*call: Any) -> Any:
        from kernel_index.jax.interval_attention import run_cached

        return run_cached(backend, *call)

    return run


JAX_BACKENDS = (
    Backend("pallas", pallas_why_not, _run("pallas"), pallas_not_worth, _details("pallas")),
    Backend("xla", always, _run("xla"), details=_details("xla")),
)
