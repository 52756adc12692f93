"""The training loop: one function of its configuration, resumable bit for bit."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import kernel_index as ki
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm.config import PRESETS, ModelConfig
from kernel_index.lm.data import IGNORED, PackedRows, load_documents, unigram_bits_per_byte
from kernel_index.lm.model import LanguageModel, flops_per_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is saved."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's numbers, and how often it is saved."""

    preset: str
    model: ModelConfig
    steps: int
    batch_rows: int
    learning_rate: float
    seed: int = 0
    dtype: str = "float32"
    data: str | None = None
    glob: str = "**/*.py"
    checkpoint_every: int = 100
    evaluate_every: int = 50
    validation_rows: int = 64
    weight_decay: float = 0.1
    clip: float = 1.0

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "RunConfig":
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        p = PRESETS[name]
        config = cls(name, p.model, p.steps, p.batch_rows, p.learning_rate)
        return replace(config, **{k: v for k, v in changes.items() if v is not None})

    def __post_init__(self):
        for name in ("steps", "batch_rows", "checkpoint_every", "evaluate_every", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

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
    """One optimizer step.  ``loss`` is in nats per byte; ``validation`` in bits per byte, where it was measured."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    validation: float | None = None


class Trainer:
    """A run in a folder: ``metrics.jsonl``, ``config.json`` and checkpoints.

    Iterate over ``steps()``; call ``save()`` whenever; ``Trainer.resume(folder)`` continues the newest checkpoint.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        torch.manual_seed(config.seed)
        train, held_out = load_documents(Path(config.data) if config.data else None, config.glob)
        self.model = LanguageModel(config.model)
        self.rows = PackedRows(train, config.model.context)
        self.validation = self._validation_batches(held_out)
        self.unigram = unigram_bits_per_byte(train, self.validation)
        self.optimizer = self._make_optimizer()
        self.step = 0
        self.receipts: Counter[ki.Receipt] = Counter()

    @classmethod
    def start(cls, config: RunConfig, folder: Path) -> "Trainer":
        """A new run; refuses a folder that already holds one."""
        if (folder / "config.json").exists():
            raise ValueError(f"out must be a new folder, got {folder}, which holds a run: resume it or choose another")
        trainer = cls(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
        return trainer

    @classmethod
    def resume(cls, folder: Path, *, steps: int | None = None, checkpoint_every: int | None = None) -> "Trainer":
        """Continue the newest checkpoint of a run.  With the run's own ``steps`` the numbers are those of one run."""
        config = read_config(folder)
        config = replace(
            config, steps=steps or config.steps, checkpoint_every=checkpoint_every or config.checkpoint_every
        )
        saved = ckpt.read(folder)
        trainer = cls(config, folder)
        ckpt.load_model(trainer.model, saved)
        if saved.state["rows"] != len(trainer.rows):
            raise ckpt.CheckpointError(
                f"the data has changed since the checkpoint: {saved.state['rows']} packed rows then, "
                f"{len(trainer.rows)} now"
            )
        ckpt.load_optimizer(trainer.model, trainer.optimizer, saved.optimizer)
        trainer.step = saved.step
        trainer._trim_metrics()
        return trainer

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the run, one report per optimizer step; saves as configured and at the end."""
        c = self.config
        with (self.folder / "metrics.jsonl").open("a") as metrics:
            while self.step < c.steps:
                report = self._one_step()
                metrics.write(json.dumps(asdict(report)) + "\n")
                metrics.flush()
                if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.save()
                yield report

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        state = {"config": self.config.to_json(), "rows": len(self.rows)}
        optimizer = ckpt.optimizer_tensors(self.model, self.optimizer)
        return ckpt.write(self.folder, ckpt.Checkpoint(self.step, self.model.state_dict(), optimizer, state))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte over the validation rows."""
        self.model.eval()
        nats, count = 0.0, 0
        for batch in self.validation:
            with self._autocast():
                nats += float(self.model.loss(batch, reduction="sum", z_loss=0.0))
            count += int((batch.targets != IGNORED).sum())
        self.model.train()
        return nats / count / math.log(2)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the run, then a cosine to a tenth."""
        warm = max(1, self.config.steps // 20)
        if step < warm:
            return self.config.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.config.steps - warm)
        return self.config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    @property
    def flops_per_step(self) -> float:
        return flops_per_token(self.config.model) * self.config.batch_rows * self.config.model.context

    def _one_step(self) -> StepReport:
        c, start = self.config, time.perf_counter()
        batch = self.rows.at_step(self.step, c.batch_rows, c.seed)
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with ki.receipts() as log:
            with self._autocast():
                loss = self.model.loss(batch)
            loss.backward()
        self.receipts += log.counts()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        loss_value = float(loss.detach())
        if not math.isfinite(loss_value) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"the loss is {loss_value} and the gradient norm {float(norm)} at step {self.step + 1}; the weights "
                f"were not changed; the last good checkpoint is {ckpt.newest(self.folder) or 'none yet'}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start
        validation = self.evaluate() if self.step % c.evaluate_every == 0 or self.step == c.steps else None
        tokens = int(batch.valid_counts.sum())
        return StepReport(self.step, loss_value, rate, float(norm), tokens, seconds, validation)

    def _autocast(self):
        return torch.autocast("cpu", DTYPES[self.config.dtype], enabled=self.config.dtype != "float32")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim > 1 and not n.startswith("embed")]
        rest = [p for n, p in self.model.named_parameters() if p.ndim <= 1 or n.startswith("embed")]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)

    def _validation_batches(self, held_out: list) -> list:
        rows = PackedRows(held_out, self.config.model.context)
        order = rows.order(0, 0)[: self.config.validation_rows].tolist()
        size = self.config.batch_rows
        return [rows.batch(order[i : i + size]) for i in range(0, len(order), size)]

    def _trim_metrics(self) -> None:
        """Drop what was logged after the checkpoint: those steps are about to be done again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            draft = path.with_suffix(".draft")
            draft.write_text("".join(f"{line}\n" for line in kept))
            draft.replace(path)


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder."""
    path = folder / "config.json"
    try:
        return RunConfig.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ckpt.CheckpointError(f"cannot read the run's configuration {path}: {error}") from error


def read_metrics(folder: Path) -> list[StepReport]:
    """Every step of a run so far."""
    path = folder / "metrics.jsonl"
    return [StepReport(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
