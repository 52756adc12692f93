"""The rules that a backend's predicates can return, read from their source as fixed sentences."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any


def sentences(predicate: Callable[..., Any]) -> tuple[str, ...]:
    """The rules that a predicate, or a predicate that it calls, can return: fixed strings, in source order."""
    found: dict[str, None] = {}
    _collect(predicate, found, set())
    return tuple(found)


def _collect(function: Any, found: dict[str, None], seen: set[CodeType]) -> None:
    if isinstance(function, functools.partial):
        for argument in function.args:  # the rule of another op, with its arguments bound
            _collect(argument, found, seen)
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    if not function.__module__.startswith("kernel_index"):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = inspect.getclosurevars(function)
    scope = {**names.globals, **names.nonlocals}
    for node in ast.walk(tree):
        if isinstance(node, ast.Return | ast.Assign) and node.value is not None:
            for text in _strings(node.value, scope):
                found.setdefault(text)
        elif isinstance(node, ast.Call):
            _collect(_resolve(node.func, scope), found, seen)


def _strings(node: ast.AST, scope: dict[str, Any]) -> Iterator[str]:
    """String constants that may be the value of an expression; what a call or a comparison reads is not."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name | ast.Attribute):
        value = _resolve(node, scope)
        if isinstance(value, str):
            yield value
    elif isinstance(node, ast.IfExp):
        yield from _strings(node.body, scope)
        yield from _strings(node.orelse, scope)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _strings(value, scope)


def _resolve(node: ast.AST, scope: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        value = _resolve(node.value, scope)
        ours = isinstance(value, ModuleType) and value.__name__.startswith("kernel_index")
        return getattr(value, node.attr, None) if ours else None  # torch loads parts of itself when they are named
    return None
