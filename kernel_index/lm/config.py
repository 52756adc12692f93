"""What a model is made of, and the presets."""

from dataclasses import asdict, dataclass, fields
from typing import Any

LAYERS = {"A": "attention followed by a squared-ReLU MLP"}
"""Letters of the pattern string."""


@dataclass(frozen=True)
class ModelConfig:
    """A byte-level language model.

    ``pattern`` has one letter per block and ``windows`` one entry per block: the previous tokens that an attention
    block sees, None for all.  The vocabulary holds the 256 bytes and one start-of-document token, padded.
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

    def __post_init__(self):
        unknown = sorted(set(self.pattern) - set(LAYERS))
        if unknown or not self.pattern:
            known = ", ".join(f"{k} ({v})" for k, v in LAYERS.items())
            raise ValueError(f"pattern must be made of the letters {known}, got {self.pattern!r}")
        if len(self.windows) != len(self.pattern):
            raise ValueError(f"windows must have one entry per block ({len(self.pattern)}), got {len(self.windows)}")
        if self.vocab > self.padded_vocab:
            raise ValueError(f"padded_vocab must be at least vocab ({self.vocab}), got {self.padded_vocab}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"model configuration must have the fields of ModelConfig, got {', '.join(unknown)}")
        changed: dict[str, Any] = {**values, "windows": tuple(values["windows"])}
        return cls(**changed)


@dataclass(frozen=True)
class Preset:
    """A model and the training that suits it."""

    model: ModelConfig
    steps: int
    batch_rows: int
    learning_rate: float
    about: str


PRESETS = {
    "tiny": Preset(
        ModelConfig(
            pattern="AAAA", windows=(128, None, 128, None), dim=256, heads=4, kv_heads=2, head_dim=64, hidden=1024,
            context=512, dropout=0.0,
        ),
        steps=300, batch_rows=4, learning_rate=3e-3, about="about 3 minutes on 2 CPU cores",
    ),
    "nano": Preset(
        ModelConfig(
            pattern="AA", windows=(32, None), dim=64, heads=2, kv_heads=1, head_dim=32, hidden=128, context=128,
            dropout=0.1,
        ),
        steps=20, batch_rows=4, learning_rate=5e-3, about="seconds: for tests",
    ),
}  # fmt: skip
