"""The law of ``reference``: no registered op, no native call and no compiled region runs below it.

Asked for by the argument, by the environment or by ``ki.force``, forward and backward, routers and selections included.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.force import reload_environment
from kernel_index.core.inductor import Region
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.proofs.errors import differentiable, run

SIZES = (1024, 4096)  # of the dimension that varies: the first at which auto takes compiled code, else the first
CONFIG = ki.ClusteredSparseConfig(block_size=8, topk=4)
SEARCHED = ki.ClusteredSparseConfig(block_size=8, topk=4, hierarchy=(4, 4))
JOINED = ki.ClusteredSparseConfig(block_size=8, topk=4, report_unions=True)
DENSE = ki.ClusteredSparseConfig(block_size=8, topk=4, dense_above=0.0)


def routed(n: int = 1024) -> dict[str, Any]:
    """Queries, keys and values of one layer, long enough for the native router and core."""
    m = Maker(torch.float32)
    return {"q": m.normal(1, n, 4, 16), "k": m.normal(1, n, 2, 16), "v": m.normal(1, n, 2, 16)}


def without_v(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "v"}


class Call:
    """A public function and the arguments of one call."""

    def __init__(self, function: Any, kwargs: dict[str, Any], names: tuple[str, ...] = ()):
        self.function, self.kwargs, self.names = function, kwargs, names

    def run(self, **backend: Any) -> None:
        run(self.function, self.kwargs, list(self.names), **backend)


def of_suite(suite: Suite) -> Call:
    calls = [suite.sized(Maker(torch.float32), n) for n in SIZES]
    taken = [ki.explain(suite.function, **kwargs).would_run for kwargs in calls]
    kwargs = calls[next((i for i, name in enumerate(taken) if name not in ("reference", None)), 0)]
    return Call(suite.function, kwargs, tuple(differentiable(suite, kwargs, "reference")))


def calls() -> Iterator[Any]:
    """Every suite at such a size, and what routes in another way than its suite does."""
    for suite in suites():
        yield pytest.param(functools.partial(of_suite, suite), id=suite.op)
    qkv = ("q", "k", "v")
    route = {"block_size": 8, "topk": 4}
    more = {
        "moba_attention, long": lambda: Call(ki.moba_attention, {**routed(), **route}, qkv),
        "moba_attention, kv_group": lambda: Call(
            ki.moba_attention, {**routed(), **route, "route_per": "kv_group"}, qkv
        ),
        "moba_route": lambda: Call(ki.moba_route, {**without_v(routed()), **route}),
        "clustered, long": lambda: Call(ki.clustered_sparse_attention, {**routed(), "config": CONFIG}, qkv),
        "clustered, hierarchy": lambda: Call(ki.clustered_sparse_attention, {**routed(), "config": SEARCHED}, qkv),
        "clustered, unions": lambda: Call(ki.clustered_sparse_attention, {**routed(), "config": JOINED}, qkv),
        "clustered, dense": lambda: Call(ki.clustered_sparse_attention_with_lse, {**routed(), "config": DENSE}, qkv),
        "clustered_route": lambda: Call(ki.clustered_route, {**without_v(routed()), "config": CONFIG}),
        "clustered_route, hierarchy": lambda: Call(ki.clustered_route, {**without_v(routed()), "config": SEARCHED}),
    }
    for name, build in more.items():
        yield pytest.param(build, id=name)


CALLS = list(calls())


@pytest.fixture
def ran(monkeypatch):
    """The names of registered ops, native functions and compiled regions that ran.

    Functions are replaced, since a ``TorchDispatchMode`` would itself make compiled backends decline.
    """
    names: list[str] = []
    call_op, call_native, call_region = torch._ops.OpOverload.__call__, native.call, Region.__call__

    def op(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.namespace == "kernel_index":
            names.append(str(self))
        return call_op(self, *args, **kwargs)

    def function(source: Any, name: str, *args: Any) -> Any:
        names.append(f"{source.name}: {name}")
        return call_native(source, name, *args)

    def region(self: Region, *args: Any) -> Any:
        names.append(f"region {self.function.__name__}")
        return call_region(self, *args)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", op)
    monkeypatch.setattr(native, "call", function)
    monkeypatch.setattr(Region, "__call__", region)
    return names


@pytest.mark.parametrize("build", CALLS)
def test_the_reference_is_plain_pytorch(build, ran, monkeypatch):
    call = build()
    call.run(backend="reference")
    with ki.receipts() as log, ki.force("reference"):
        call.run()
    assert {r.ran for r in log} == {"reference"}
    assert {r.routed_by for r in log} <= {"", "reference"}
    monkeypatch.setenv("KERNEL_INDEX_BACKEND", "reference")
    reload_environment()
    call.run()
    assert ran == []


@pytest.mark.thorough
def test_auto_runs_what_the_law_forbids(ran):
    """The same calls without the request: else the law would hold because the spies see nothing."""
    seen: set[str] = set()
    for parameter in CALLS:
        ran.clear()
        parameter.values[0]().run()
        if ran:
            seen.add(parameter.id)
    routed_calls = {p.id for p in CALLS[len(suites()) :]}
    if machine := native.why_not(torch.empty(1)):
        pytest.skip(machine)
    assert routed_calls <= seen
    assert len(seen - routed_calls) >= 12, sorted(seen)
