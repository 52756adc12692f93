"""The backends of ``kernel_index.jax.attention``.

The table can be read without JAX, which is imported when a call is made.
"""

import functools
from typing import Any

from kernel_index.core.dispatch import Backend, always
from kernel_index.jax.attention_contract import AttentionCall, pallas_not_worth, pallas_why_not


def _details(backend: str, call: AttentionCall) -> tuple[tuple[str, Any], ...]:
    from kernel_index.jax.attention_compiled import is_cached
    from kernel_index.jax.target import mode_of

    return (
        ("mode", mode_of(call.q) if backend == "pallas" else "compiled"),
        ("mask_cache", "hit" if is_cached(backend, call) else "miss"),
    )


def _run(backend: str, call: AttentionCall) -> Any:
    from kernel_index.jax.attention_compiled import run_cached

    return run_cached(backend, call)


def _backend(name: str, why_not: Any, not_worth: Any = None) -> Backend:
    return Backend(name, why_not, functools.partial(_run, name), not_worth, functools.partial(_details, name))


JAX_BACKENDS = (_backend("pallas", pallas_why_not, pallas_not_worth), _backend("xla", always))
