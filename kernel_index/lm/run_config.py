"""The configuration of a run, and the report of a step."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from kernel_index.lm.checkpoint import CheckpointError
from kernel_index.lm.config import PRESETS, Device, Dtype, ModelConfig
from kernel_index.lm.data import TEXT

Backend = Literal["auto", "reference"]
Parallel = Literal["fsdp", "tensor"]

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's numbers, and how often it is saved.

    A step takes ``accumulate`` micro-batches of ``batch_rows`` rows.  ``recompute`` keeps only the inputs of each block
    and computes the rest again in backward.  ``compile`` puts the whole model through ``torch.compile``.  The S blocks
    attend to all keys before step ``sparse_from_step``.  ``backend="reference"`` runs the plain formula of every op.
    Several processes share rows and parameters (``parallel="fsdp"``), or heads, hidden channels and vocabulary
    (``"tensor"``: A blocks only, every process computes all rows).
    """

    preset: str
    model: ModelConfig
    steps: int
    batch_rows: int
    learning_rate: float
    seed: int = 0
    dtype: Dtype = "float32"
    data: str | None = None
    glob: str = "**/*.py"
    checkpoint_every: int = 100
    evaluate_every: int = 50
    validation_rows: int = 64
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    recompute: bool = False
    compile: bool = False
    sparse_from_step: int = 0
    backend: Backend = "auto"
    device: Device = "cpu"
    parallel: Parallel = "fsdp"

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "RunConfig":
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        preset = {f.name: getattr(PRESETS[name], f.name) for f in fields(PRESETS[name]) if f.name != "about"}
        given = {k: v for k, v in changes.items() if v is not None}
        if "data" in given:  # the default pattern is of the default data
            given.setdefault("glob", TEXT)
        settings: dict[str, Any] = {**preset, **given}
        return cls(name, **settings)

    def __post_init__(self):
        for name in ("steps", "batch_rows", "checkpoint_every", "evaluate_every", "validation_rows", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sparse_from_step < 0:
            raise ValueError(f"sparse_from_step must be at least 0, got {self.sparse_from_step}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        for name in ("learning_rate", "weight_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.clip == 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        choices = {f.name: get_args(f.type) for f in fields(self) if get_origin(f.type) is Literal}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where PyTorch sees no GPU, got 'cuda'")

    @classmethod
    def read_settings(cls, given: Sequence[str]) -> dict[str, Any]:
        """``["accumulate=2", "recompute=true"]`` as values of fields.

        Raises:
            ValueError: no such field, or a value of another type.

        >>> RunConfig.read_settings(["accumulate=2", "recompute=true"])
        {'accumulate': 2, 'recompute': True}
        """
        kinds = {f.name: str if get_origin(f.type) is Literal else f.type for f in fields(cls)}
        kinds = {name: kind for name, kind in kinds.items() if kind in (int, float, bool, str)}
        found: dict[str, Any] = {}
        for setting in given:
            name, equals, value = setting.partition("=")
            if name not in kinds or not equals:
                raise ValueError(f"--set must be NAME=VALUE with a name of {', '.join(kinds)}, got {setting!r}")
            kind = kinds[name]
            try:
                read = value if kind is str else json.loads(value)
            except json.JSONDecodeError:
                read = value
            if kind is float and type(read) is int:
                read = float(read)
            if type(read) is not kind:
                raise ValueError(f"--set {name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}")
            found[name] = read
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunConfig":
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"run configuration must have the fields of RunConfig, got {', '.join(unknown)}")
        changed: dict[str, Any] = {**values, "model": ModelConfig.from_json(values["model"])}
        return cls(**changed)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.  ``loss`` is in nats per byte; ``validation`` in bits per byte, if measured at this step."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    validation: float | None = None

    def scalars(self) -> dict[str, float]:
        """Values by their tags in TensorBoard."""
        found = {
            "train/loss_nats": self.loss,
            "train/gradient_norm": self.gradient_norm,
            "train/learning_rate": self.learning_rate,
            "train/tokens_per_second": self.tokens / self.seconds,
        }
        return found if self.validation is None else {**found, "validation/bits_per_byte": self.validation}


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"--out must be a run folder, got {folder}, which holds no config.json")
    try:
        return RunConfig.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read the run's configuration {path}: {error}") from error


def read_metrics(folder: Path) -> list[StepReport]:
    """Every step of a run so far, without an incomplete last line."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text().split("\n")
        return [StepReport(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
