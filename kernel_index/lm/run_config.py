"""The configuration of a run, and the report of a step."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from kernel_index.lm.checkpoint import CheckpointError, NoCheckpoint
from kernel_index.lm.config import PRESETS, Device, Dtype, ModelConfig

Backend = Literal["auto", "reference"]
Parallel = Literal["fsdp", "tensor"]

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the numbers of a run, and how often it is saved.

    Each field is an option of ``kernel-index train``: its type, its default and the text below it are what the command
    reads, checks and shows.  The fields of ``model`` are options too, as ``--model.dim``.
    """

    preset: str
    """Model and schedule, whose values are the other defaults: tiny, nano, small or base."""
    model: ModelConfig
    steps: int
    """Optimizer steps."""
    batch_rows: int
    """Rows of a micro-batch."""
    learning_rate: float
    """Highest learning rate, after the warm-up."""
    seed: int = 0
    """Seed of the weights, the order of the data and the dropout."""
    dtype: Dtype = "float32"
    """Precision of the products; bfloat16 is autocast, the weights stay float32."""
    data: str | None = None
    """Folder of text files, or one file, whose end is held out. None: Python's standard library."""
    glob: str | None = None
    """Files of the folder. None: every text file; of the standard library, every Python file."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    evaluate_every: int = 50
    """Steps between validations."""
    validation_rows: int = 64
    """Held-out rows of a validation, at most."""
    weight_decay: float = 0.1
    """Weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    accumulate: int = 1
    """Micro-batches of a step."""
    recompute: bool = False
    """Keep only the inputs of each block, and compute the rest again in backward."""
    compile: bool = False
    """Put each block through torch.compile; with several processes, the whole model."""
    graphs: bool = True
    """Record forward and backward as a CUDA graph, on one GPU and without dropout or torch.compile."""
    sparse_from_step: int = 0
    """S blocks attend to all keys before this step."""
    backend: Backend = "auto"
    """reference runs the plain formula of every function."""
    device: Device = "cpu"
    """Device that trains."""
    parallel: Parallel = "fsdp"
    """Several processes share rows and parameters (fsdp), or heads, hidden channels and vocabulary (tensor: models of A
    blocks only)."""

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "RunConfig":
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        preset = {f.name: getattr(PRESETS[name], f.name) for f in fields(PRESETS[name]) if f.name != "about"}
        settings: dict[str, Any] = {**preset, **{k: v for k, v in changes.items() if v is not None}}
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
        raise NoCheckpoint(f"--out must be a run folder, got {folder}, which holds no config.json")
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
