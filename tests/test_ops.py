"""How registered operators are called."""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernel_index.core import ops


def test_a_launcher_is_called_directly_where_nothing_would_see_the_op():
    on_a_gpu, elsewhere = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    called = lambda x: ops.run(lambda _: "op", lambda _: "launcher", x)  # noqa: E731
    assert called(on_a_gpu) == "launcher"
    assert called(elsewhere) == "op"
    with FakeTensorMode():
        assert called(on_a_gpu) == "op"
    seen = []
    torch.func.vmap(lambda x: seen.append(called(on_a_gpu)) or x)(torch.zeros(2))
    assert seen == ["op"]
