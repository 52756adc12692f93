"""``prove numerics``: every entry × backend that this machine can run, against float64, within derived budgets."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kernel_index.core.dispatch import Ineligible, explain
from kernel_index.core.target import has_package
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.proofs.errors import Finding, assess


@dataclass(frozen=True)
class Verdict:
    """One call: passed, failed (``findings`` over their budgets, or ``raised``) or refused by a rule."""

    op: str
    backend: str
    case: str
    dtype: str
    findings: tuple[Finding, ...] = ()
    refused: str = ""
    raised: str = ""

    @property
    def passes(self) -> bool:
        """Refused, or all that was compared is within its budget.  Where nothing was compared nothing is proven."""
        return bool(self.refused) or (not self.raised and bool(self.findings) and all(f.passes for f in self.findings))

    @property
    def worst(self) -> float:
        """The largest share of its budget that an output or gradient uses."""
        return max((f.share for f in self.findings), default=0.0)


def launch_errors() -> tuple[type[BaseException], ...]:
    """What a backend may raise that is a verdict about it, and no reason to stop proving the others."""
    found: tuple[type[BaseException], ...] = (RuntimeError, ValueError, TypeError, AttributeError)
    if has_package("triton"):
        from triton.errors import TritonError

        found += (TritonError,)
    return found


def prove(
    device: str = "cpu", backends: Iterable[str] | None = None, ops: Iterable[str] | None = None, every: bool = True
) -> Iterator[Verdict]:
    """Yield a verdict for each case; ``every=False`` takes the first case of each suite only."""
    wanted_backends = None if backends is None else set(backends)
    wanted_ops = None if ops is None else set(ops)
    for suite in suites():
        if wanted_ops is not None and suite.op not in wanted_ops:
            continue
        for backend in suite.backends:
            if wanted_backends is None or backend.name in wanted_backends:
                yield from _prove_backend(suite, backend.name, device, every)


def _prove_backend(suite: Suite, backend: str, device: str, every: bool) -> Iterator[Verdict]:
    for case in suite.cases if every else suite.cases[:1]:
        for dtype in suite.dtypes:
            place = (suite.op, backend, case.name, str(dtype).removeprefix("torch."))
            try:
                kwargs = placed(case.build(Maker(dtype, device=device)), device)
                rule = explain(suite.function, **kwargs, backend=backend).verdicts[backend]
                if rule is not None:
                    verdict = Verdict(*place, refused=rule)
                else:
                    verdict = Verdict(*place, findings=tuple(assess(suite, backend, kwargs)))
            except Ineligible as error:  # a rule of the gradients' alone
                verdict = Verdict(*place, refused=str(error))
            except launch_errors() as error:
                verdict = Verdict(*place, raised=f"{type(error).__name__}: {error}"[:500])
            yield verdict


def placed(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """Moves the ids and counts of a case's mask to the device: cases write them as lists, on the host."""
    return {name: value.to(device) if isinstance(value, MaskContract) else value for name, value in kwargs.items()}
