"""The request of a proof: sizes, dtype, mask and seed of one attention call, checked before anything runs."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from kernel_index.core import checks

DtypeName = Literal["bfloat16", "float16"]
DTYPES: dict[DtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class ProofShape(NamedTuple):
    """q [batch, seq, heads, head_dim]; k and v [batch, seq, kv_heads, head_dim].

    >>> import kernel_index as ki
    >>> ki.ProofShape(seq=512).heads
    8
    """

    batch: int = 2
    seq: int = 1024
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64


@dataclass(frozen=True)
class ProofRequest:
    """One call of flash-attn-4, forward and backward."""

    shape: ProofShape
    dtype: str = "bfloat16"
    causal: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, size in self.shape._asdict().items():
            checks.is_int(name, size, minimum=1)
        if self.shape.heads % self.shape.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads ({self.shape.kv_heads}), got {self.shape.heads}")
        if self.shape.head_dim % 8 or self.shape.head_dim > 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.shape.head_dim}")
        checks.one_of("dtype", self.dtype, tuple(DTYPES))
        checks.is_bool("causal", self.causal)
        checks.is_int("seed", self.seed, minimum=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"shape": self.shape._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ProofRequest":
        return cls(**values | {"shape": ProofShape(**values["shape"])})
