"""Configurations of models, and the presets."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kernel_index.core import checks
from kernel_index.lm.data import START
from kernel_index.nn.experts import Scores
from kernel_index.nn.mlp import Activation
from kernel_index.nn.sparse_attention import KINDS, SparseKind

LAYERS = {
    "A": "attention, then a feed-forward layer",
    "S": "sparse attention, then a feed-forward layer",
    "L": "latent attention, then a feed-forward layer",
    "M": "Mamba-2 mixer",
    "E": "experts",
}
"""Letters of the pattern string."""

Residual = Literal["fp32", "plain", "mhc", "mhc-plain"]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]


def _check_fields(config: Any, **least: int) -> None:
    """Each field has its type; integers are at least 1 and other numbers at least 0, or what ``least`` says."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if kind is int:
            checks.is_int(name, value, minimum=least.get(name, 1))
        elif kind is float:
            checks.is_real(name, value)
            if value < least.get(name, 0):
                raise ValueError(f"{name} must be at least {least.get(name, 0)}, got {value}")
        elif kind is bool:
            checks.is_bool(name, value)
        elif get_origin(kind) is Literal:
            checks.one_of(name, value, get_args(kind))
        elif (kind is str or is_dataclass(kind)) and not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")


@dataclass(frozen=True)
class Sparse:
    """The S blocks: ``kinds`` has one entry per S block, used in turn where there are more blocks.

    Each query selects ``topk`` blocks of ``block`` tokens, its current block included.  Exact-token attention selects
    ``tokens`` tokens by an indexer of ``index_heads`` heads of ``index_dim`` channels; ``nsa``
    has a window of so many.  ``hierarchy`` and
    ``report_unions`` are those of the clustered blocks: see ``nn.SparseAttention``.
    """

    kinds: tuple[SparseKind, ...] = ("clustered",)
    block: int = 32
    topk: int = 4
    tokens: int = 64
    index_heads: int = 2
    index_dim: int = 32
    hierarchy: tuple[int, int] | None = None
    report_unions: bool = False

    def __post_init__(self):
        _check_fields(self)
        if not isinstance(self.kinds, tuple) or not self.kinds or any(k not in KINDS for k in self.kinds):
            raise ValueError(f"kinds must be made of {', '.join(KINDS)}, got {self.kinds}")
        if self.hierarchy is not None:
            if not isinstance(self.hierarchy, tuple) or len(self.hierarchy) != 2:
                raise TypeError(f"hierarchy must be a pair or None, got {self.hierarchy!r}")
            for number in self.hierarchy:
                checks.is_int("hierarchy", number, minimum=1)


@dataclass(frozen=True)
class Latent:
    """L blocks: latent channels, rotated channels, and whether to use the fused projection."""

    latent: int = 64
    rope: int = 32
    fused: bool = False

    def __post_init__(self):
        _check_fields(self, rope=2)
        if self.rope % 2:
            raise ValueError(f"rope must be even, got {self.rope}")


@dataclass(frozen=True)
class StateSpace:
    """M blocks: heads of ``head_dim`` channels with a state of ``state`` each."""

    heads: int = 8
    head_dim: int = 64
    state: int = 32
    chunk: int = 64

    def __post_init__(self):
        _check_fields(self)


@dataclass(frozen=True)
class ExpertLayer:
    """E blocks: ``topk`` of ``count`` experts of width ``hidden`` per token, and a shared one of width ``shared``."""

    count: int = 8
    topk: int = 2
    hidden: int = 256
    shared: int = 0
    scores: Scores = "sigmoid"
    balance: float = 1e-3

    def __post_init__(self):
        _check_fields(self, shared=0)


@dataclass(frozen=True)
class ModelConfig:
    """A language model.

    ``pattern`` has one letter per block and ``windows`` one entry per block: the previous tokens that an A or S block
    sees, None for all.  ``hidden`` is the width of the feed-forward layers; 0 leaves them to the E blocks.
    ``residual``: ``"fp32"`` is one stream in float32, ``"plain"`` one in the model's own dtype; ``"mhc"`` and
    ``"mhc-plain"`` are four streams with hyper-connections, in float32 and in the model's own dtype.  ``ahead`` adds a
    head that predicts the token after the next, at ``ahead`` times the loss.  The default vocabulary holds the 256
    bytes and one start-of-document token, padded.
    """

    pattern: str
    windows: tuple[int | None, ...]
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    dropout: float = 0.0
    rope_base: float = 10_000.0
    vocab: int = 257
    padded_vocab: int = 320
    z_loss: float = 1e-4
    residual: Residual = "fp32"
    activation: Activation = "relu2"
    ahead: float = 0.0
    sparse: Sparse = field(default_factory=Sparse)
    latent: Latent = field(default_factory=Latent)
    state_space: StateSpace = field(default_factory=StateSpace)
    experts: ExpertLayer = field(default_factory=ExpertLayer)

    def __post_init__(self):
        _check_fields(self, hidden=0, vocab=START + 1)
        self._check_blocks()
        if self.vocab > self.padded_vocab:
            raise ValueError(f"padded_vocab must be at least vocab ({self.vocab}), got {self.padded_vocab}")
        if self.dropout > 1:
            raise ValueError(f"dropout must be at most 1, got {self.dropout}")
        if self.rope_base == 0:
            raise ValueError(f"rope_base must be above 0, got {self.rope_base}")

    def _check_blocks(self) -> None:
        unknown = sorted(set(self.pattern) - set(LAYERS))
        if unknown or not self.pattern:
            known = ", ".join(f"{k} ({v})" for k, v in LAYERS.items())
            raise ValueError(f"pattern must be made of the letters {known}, got {self.pattern!r}")
        if not isinstance(self.windows, tuple):
            raise TypeError(f"windows must be a tuple, got {self.windows!r}")
        if len(self.windows) != len(self.pattern):
            raise ValueError(f"windows must have one entry per block ({len(self.pattern)}), got {len(self.windows)}")
        for i, (letter, window) in enumerate(zip(self.pattern, self.windows, strict=True)):
            if window is None:
                continue
            if letter not in "AS":
                raise ValueError(f"windows must be None but for A and S blocks, got one for block {i}")
            checks.is_int("windows", window, minimum=0)

    def sparse_kind(self, block: int) -> SparseKind:
        """The kind of the S block at this index of the pattern."""
        return self.sparse.kinds[self.pattern[:block].count("S") % len(self.sparse.kinds)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        nested = {name: _read(kind, values[name]) for name, kind in NESTED.items() if name in values}
        return _read(cls, {**values, **nested})


NESTED = {"sparse": Sparse, "latent": Latent, "state_space": StateSpace, "experts": ExpertLayer}

Config = TypeVar("Config")


def _read(kind: type[Config], values: Any) -> Config:
    """From JSON, which has lists for tuples.  The values may come from any file, so every field is checked."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} must be an object with its fields, got {values!r}")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ValueError(f"model configuration must have the fields of {kind.__name__}, got {', '.join(unknown)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Preset:
    """A model and its training."""

    model: ModelConfig
    steps: int
    batch_rows: int
    learning_rate: float
    about: str
    accumulate: int = 1
    recompute: bool = False
    dtype: Dtype = "float32"
    device: Device = "cpu"


PRESETS = {
    "tiny": Preset(
        ModelConfig(
            pattern="MASLMSSE", windows=(None, 128, None, None, None, None, None, None), dim=192, heads=3, kv_heads=1,
            head_dim=64, hidden=512, context=512, residual="mhc",
            sparse=Sparse(
                ("exact_token", "moba", "clustered"), block=32, topk=4, tokens=48, hierarchy=(4, 2), report_unions=True
            ),
            latent=Latent(latent=64, rope=32, fused=True),
            state_space=StateSpace(heads=4, head_dim=64, state=32),
            experts=ExpertLayer(count=8, topk=2, hidden=512),
        ),
        steps=180, batch_rows=4, learning_rate=4e-3, about="a few minutes on 2 CPU cores",
    ),
    "nano": Preset(
        ModelConfig(
            pattern="AA", windows=(32, None), dim=64, heads=2, kv_heads=1, head_dim=32, hidden=128, context=128,
            dropout=0.1,
        ),
        steps=20, batch_rows=4, learning_rate=5e-3, about="seconds: for tests",
    ),
    "small": Preset(
        ModelConfig(
            pattern="MAEMSEMLEMSE", windows=(None, 512) + 10 * (None,), dim=512, heads=8, kv_heads=2, head_dim=64,
            hidden=0, context=2048, residual="mhc-plain", ahead=0.2,
            sparse=Sparse(("clustered", "moba"), block=64, topk=8),
            latent=Latent(latent=128, rope=32, fused=True),
            state_space=StateSpace(heads=16, head_dim=64, state=64),
            experts=ExpertLayer(count=16, topk=2, hidden=768, shared=512),
        ),
        steps=2000, batch_rows=16, learning_rate=1.5e-3, about="for one GPU", dtype="bfloat16", device="cuda",
    ),
    "base": Preset(
        ModelConfig(
            pattern="MAEMSEMLEMSEMAEMSEMLEMSE", windows=(None, 1024) + 11 * (None,) + (1024,) + 10 * (None,), dim=1024,
            heads=16, kv_heads=4, head_dim=64, hidden=0, context=8192, residual="mhc-plain",
            ahead=0.2,
            sparse=Sparse(("clustered", "exact_token"), block=64, topk=16, tokens=512, index_heads=4, index_dim=64),
            latent=Latent(latent=256, rope=64, fused=True),
            state_space=StateSpace(heads=32, head_dim=64, state=128, chunk=128),
            experts=ExpertLayer(count=32, topk=4, hidden=1024, shared=1024),
        ),
        steps=20_000, batch_rows=4, learning_rate=8e-4, about="for GPUs", accumulate=4, recompute=True,
        dtype="bfloat16", device="cuda",
    ),
}  # fmt: skip
"""``kernel-index train --preset NAME`` prints each one's parameters and FLOPs."""
