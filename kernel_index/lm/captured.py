"""Forward and backward of a training step as one CUDA graph: the host launches thousands of kernels at once."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.lm.data import Batch

Gradients = Callable[[Batch, Tensor], Tensor]
"""``(batch, share)``: add the gradients of ``share · loss`` to the parameters', and return that, detached."""

WARM = 2
"""Calls that run as they are before one is recorded: they compile kernels and choose algorithms."""


MOST = 4
"""Recorded graphs: each holds the memory of a step."""


class Step(NamedTuple):
    """``loss`` holds until the next step; ``receipts`` of all calls inside, also where a graph was replayed."""

    loss: Tensor
    receipts: Counter[ki.Receipt]


class RecordingError(RuntimeError):
    """A step could not be recorded.  Nothing has changed: it can still run as it is."""


class Recorder(Protocol):
    """What runs and records launches."""

    def warm(self, run: Callable[[], Step]) -> Step:
        """``run()``, where it will be recorded."""
        ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record ``run()``; the result launches the same again, over the same memory."""
        ...


class GraphRecorder:
    """Records CUDA graphs, on a stream of its own."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def warm(self, run: Callable[[], Step]) -> Step:
        callers = torch.cuda.current_stream(self.stream.device)  # that of another GPU may be current
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            found = run()
        callers.wait_stream(self.stream)
        return found

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return graph.replay


def run_step(gradients: Gradients, batch: Batch, share: Tensor) -> Step:
    with ki.receipts() as log:
        loss = gradients(batch, share)
    return Step(loss, log.counts())


class CapturedStep:
    """``gradients`` with the same effects, from the third call of a shape on by replay of a recorded graph.

    Whatever a step reads beside the batch and the share must lie in tensors that are written in place.  Random numbers
    that the host draws would be those of the recorded call.
    """

    def __init__(self, gradients: Gradients, parameters: Iterable[nn.Parameter], recorder: Recorder):
        self.gradients, self.parameters, self.recorder = gradients, list(parameters), recorder
        self.calls: Counter[Any] = Counter()
        self.recorded: dict[Any, _Recorded] = {}
        self.prepared = False
        """Whether the latest call ran as it is or was recorded, and so took longer than those to come."""

    def __call__(self, batch: Batch, share: Tensor, key: object = None) -> Step:
        """``key``: whatever else decides what is launched.  Raises ``RecordingError``."""
        kind = key, batch.kind
        self.calls[kind] += 1
        self.prepared = kind not in self.recorded
        if self.calls[kind] <= WARM or (kind not in self.recorded and len(self.recorded) >= MOST):
            return self.recorder.warm(lambda: run_step(self.gradients, batch, share))
        earlier = [p.grad for p in self.parameters]
        if kind not in self.recorded:
            self.recorded[kind] = _Recorded(self, batch, share)
        found = self.recorded[kind]
        if any(a is not None and a is b for a, b in zip(earlier, found.grads, strict=True)):
            earlier = [None if grad is None else grad.clone() for grad in earlier]  # the replay writes where they are
        found.play(batch, share)
        for parameter, before, new in zip(self.parameters, earlier, found.grads, strict=True):
            parameter.grad = new if before is None else before if new is None else before.add_(new)
        return found.step


class _Recorded:
    """A graph, and the memory that it reads and writes."""

    def __init__(self, captured: CapturedStep, batch: Batch, share: Tensor):
        self.batch, self.share = batch.each(torch.clone), share.clone()
        self.step = Step(self.share, Counter())
        earlier = [p.grad for p in captured.parameters]
        try:
            for parameter in captured.parameters:
                parameter.grad = None  # so that the recorded backward pass makes gradients, and does not add to any
            self.replay = captured.recorder.record(lambda: self._run(captured.gradients))
            self.grads = [p.grad for p in captured.parameters]
        except RuntimeError as error:  # PyTorch's own: of CUDA, of a capture, of memory
            raise RecordingError(f"the step cannot be a CUDA graph: {str(error).splitlines()[0]}") from error
        finally:  # what failed leaves no gradient in memory that no graph will write
            for parameter, grad in zip(captured.parameters, earlier, strict=True):
                parameter.grad = grad

    def _run(self, gradients: Gradients) -> None:
        self.step = run_step(gradients, self.batch, self.share)

    def play(self, batch: Batch, share: Tensor) -> None:
        for mine, given in zip((*self.batch, self.share), (*batch, share), strict=True):
            mine.copy_(given)
        self.replay()
