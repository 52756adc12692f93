"""Legal calls of ``rope_tables``, and what must come out."""

import math
import random
from typing import Any

import torch

import kernel_index as ki
from tests.fuzz.draws import T, whole


def rope(rng: random.Random) -> dict[str, Any]:
    dim = rng.choice([2, 4, 8])
    factors = {"short_factor": [1.0 + i for i in range(dim // 2)], "long_factor": [4.0] * (dim // 2)}
    original = {"original_max_position_embeddings": rng.choice([16, 64])}
    scaling = rng.choice([
        None,
        {"rope_type": "default", "rope_theta": 100.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0, **original},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "truncate": False, **original},
        {"rope_type": "longrope", "factor": 4.0, **factors, **original},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ])  # fmt: skip
    base = None if scaling and "rope_theta" in scaling else rng.choice([10000.0, 500])
    seq_len = rng.choice([None, 8, 100])
    return {"positions": whole(rng, -5, 99, T), "dim": dim, "base": base, "scaling": scaling, "seq_len": seq_len}


def frequency(kwargs: dict[str, Any], pair: int, plain: float) -> float | None:
    """Radians per token of a pair; None where a formula of many lines says it (``test_rope_tables.py`` has them)."""
    scaling, dim, seq_len = kwargs["scaling"] or {}, kwargs["dim"], kwargs["seq_len"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "proportional":
        return plain if pair < dim // 4 else 0.0
    if kind == "dynamic":
        longer = (seq_len or 0) / scaling["original_max_position_embeddings"]
        growth = 1 + scaling["factor"] * (longer - 1) if longer > 1 and dim > 2 else 1.0
        return plain * growth ** (-2 * pair / (dim - 2)) if dim > 2 else plain
    if kind == "longrope":
        longer = (seq_len or 0) > scaling["original_max_position_embeddings"]
        return plain / scaling["long_factor" if longer else "short_factor"][pair]
    return plain if kind == "default" else None


def check_rope(kwargs: dict[str, Any], found: ki.RopeTables) -> None:
    """The angles, and one factor on every cosine and sine."""
    dim, scaling = kwargs["dim"], kwargs["scaling"] or {}
    base = kwargs["base"] or scaling["rope_theta"]
    cos, sin = (x.double().reshape(-1, dim // 2) for x in found)
    factor = float((cos.square() + sin.square()).sqrt().mean())
    assert torch.allclose(cos.square() + sin.square(), torch.tensor(factor, dtype=torch.float64) ** 2, rtol=1e-5)
    assert factor > 1.01 if scaling.get("rope_type") in ("yarn", "longrope") else abs(factor - 1) < 1e-6
    for t, position in enumerate(kwargs["positions"].reshape(-1).tolist()):
        for pair in range(dim // 2):
            each = frequency(kwargs, pair, base ** (-2 * pair / dim))
            if each is not None:
                assert math.isclose(cos[t, pair], factor * math.cos(position * each), abs_tol=1e-5)
                assert math.isclose(sin[t, pair], factor * math.sin(position * each), abs_tol=1e-5)
