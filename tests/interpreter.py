"""Triton's interpreter, made quicker for the suite.

Each call of a device function searches all of ``triton.language`` for builtins to replace, which takes a third to a
half of an interpreted kernel's time.  The names of a module never change, so here they are searched for once.
"""

import functools
import importlib.util
import inspect


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
