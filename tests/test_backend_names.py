"""The ``Literal`` type of a ``backend`` parameter names the backends of the op's table, in its order."""

import inspect
import typing

import pytest

from kernel_index.core.testing import suites


def names(function):
    parameter = inspect.signature(function).parameters.get("backend")
    literal = parameter is not None and typing.get_origin(parameter.annotation) is typing.Literal
    return typing.get_args(parameter.annotation) if literal else ()


TYPED = [pytest.param(s, id=s.op) for s in suites() if names(s.function)]


@pytest.mark.parametrize("suite", TYPED)
def test_the_type_is_auto_and_the_table(suite):
    assert names(suite.function) == ("auto", *(b.name for b in suite.backends))
