"""A profiler's trace names op and backend; without a profiler a call pays for no name."""

import pytest
import torch

import kernel_index as ki


def test_a_profiler_sees_op_and_backend():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ki.fused_relu_squared(torch.ones(3), backend="reference")
    assert "ki.fused_relu_squared[reference]" in {event.key for event in profile.key_averages()}


def test_without_a_profiler_nothing_is_named(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail(name))
    ki.fused_relu_squared(torch.ones(3), backend="reference")
