"""Triton's interpreter, made quicker for the suite, and with products whose rows are alone.

Each call of a device function searches all of ``triton.language`` for builtins to replace, which takes a third to a
half of an interpreted kernel's time.  The names of a module never change, so here they are searched for once.
"""

import contextlib
import functools
import importlib.util
import inspect


@contextlib.contextmanager
def rows_alone():
    """Products as on a device, where an element does not depend on its place in a tile: by rising index.

    Without it NumPy multiplies, whose library takes the last rows and columns of a tile by another kernel.
    """
    from triton.runtime import interpreter

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k : k + 1].astype(total.dtype) * b.data[k : k + 1].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    before = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = before


def remember_builtins() -> None:
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(module):
        return tuple(name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member))

    def patch(module, *rest):
        for name in builtins_of(module):
            member = getattr(module, name)
            if tl.core.is_builtin(member):  # not replaced yet by the kernel that calls this function
                interpreter._patch_attr(module, name, member, *rest)

    interpreter._patch_builtin = patch
