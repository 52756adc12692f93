"""Whether a model's log-probabilities have the same bits in training and in a rollout, axis by axis.

What the axes are, ``rollout_axes`` says.  A model is checked as a whole, and each letter of its pattern alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import kernel_index as ki
from kernel_index.core.numerics import Mode
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.rollout_axes import AXES, Axis, Finding, Subject, drawn, packed, trained
from kernel_index.nn import HyperConnectedBlocks


def check(
    model: LanguageModel,
    tokens: int,
    *,
    seed: int = 0,
    axes: Sequence[str] | None = None,
    compiler: str = "inductor",
    mode: Mode = "invariant",
) -> dict[str, Finding]:
    """Compare on random sequences that hold ``tokens`` tokens or a few more, in a mode of ``ki.numerics``."""
    generator = torch.Generator().manual_seed(seed)
    sequences = drawn(model.config, tokens, generator)
    model.eval()
    with ki.numerics(mode):
        try:
            expected = trained(model, packed(sequences, model.config.context), sequences)
        except ki.Ineligible as error:
            return {name: Finding(refused=str(error)) for name in axes or AXES}
        subject = Subject(model, sequences, expected, generator, compiler)
        return {name: _found(AXES[name], subject) for name in axes or AXES}


def _found(run: Axis, subject: Subject) -> Finding:
    finding = Finding()
    try:
        run(subject, finding)
    except ki.Ineligible as error:
        return Finding(refused=str(error))
    return finding


def of_letter(model: LanguageModel, letter: str) -> LanguageModel:
    """A model of the blocks of one letter of the pattern, with the weights of ``model``."""
    kept = [i for i, of_block in enumerate(model.config.pattern) if of_block == letter]
    windows = tuple(model.config.windows[i] for i in kept)
    config = replace(model.config, pattern=letter * len(kept), windows=windows, ahead=0.0)
    weight = model.head.weight
    alone = LanguageModel(config).to(device=weight.device, dtype=weight.dtype)
    for name in ("embed", "final", "head"):
        getattr(alone, name).load_state_dict(getattr(model, name).state_dict())
    for here, there in enumerate(kept):
        _layers(alone)[here].load_state_dict(_layers(model)[there].state_dict())
    return alone.eval()


def _layers(model: LanguageModel) -> Any:
    return model.blocks.layers if isinstance(model.blocks, HyperConnectedBlocks) else model.blocks


@dataclass
class Report:
    """The findings by model and axis: a model for each letter of the pattern, and the whole one."""

    findings: dict[str, dict[str, Finding]]
    recipes: dict[str, str] = field(default_factory=dict)  # op -> hash of the recipe that ran

    @property
    def is_exact(self) -> bool:
        return all(f.is_exact for axes in self.findings.values() for f in axes.values())

    def refusals(self) -> list[str]:
        """Each rule once."""
        return list(dict.fromkeys(f.refused for axes in self.findings.values() for f in axes.values() if f.refused))


def check_by_letter(model: LanguageModel, tokens: int, **options: Any) -> Report:
    """``check`` of the whole model, and of the blocks of each letter alone where it has several letters."""
    letters = sorted(set(model.config.pattern))
    models = {} if len(letters) == 1 else {letter: of_letter(model, letter) for letter in letters}
    models[model.config.pattern if len(letters) > 1 else letters[0]] = model
    with ki.receipts() as log:
        findings = {name: check(one, tokens, **options) for name, one in models.items()}
    return Report(findings, {r.op: r.numerics for r in log if r.numerics})
