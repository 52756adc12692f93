"""Compiles the C++ kernels: each source on its own, once for a machine, before a call needs it.

A library is a file in the user's cache folder whose name holds a hash of everything it was made from, so a changed
source, flag or PyTorch finds no library, and an unchanged one is found again.
See docs/decisions/0017-compiled-ahead.md.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from kernel_index.core.target import NO_COMPILER, Instructions, cxx_compiler, vector_instructions

logger = logging.getLogger("kernel_index")

VECTORS: dict[Instructions, tuple[str, ...]] = {
    "AVX512": ("avx512.h",),
    "AVX2": ("avx2.h", "avx2_products.h"),
}
"""The headers that stand for a kind of CPU; sources and the other headers are the same for all."""

HEADERS = ("vector.h", "common.h", "topk.h", "attention.h", "tiles.h", "kv_cache.h")
"""Put before every source, in this order, so that a source needs no ``#include``."""

# As fast as -march=native, and one library for all machines of a kind.
ARCHITECTURES: dict[Instructions, str] = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}

FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",  # a sum or product is fused where the source says so
    "-fno-trapping-math",
    "-fno-tree-loop-vectorize",  # what pays as a vector is written as one
    "-w",
)
PACKAGE = Path(__file__).parents[2]


class CannotBuild(RuntimeError):
    """A source that this machine's compiler, PyTorch or file system made no library of."""


class Built(NamedTuple):
    """One source: its library, and the seconds of its compilation; 0 where the library was there."""

    source: Path
    library: Path
    seconds: float


def sources() -> tuple[Path, ...]:
    """Every source of the package, the largest first: processes that share them then end together."""
    return tuple(sorted(PACKAGE.rglob("*.cpp"), key=lambda path: (-path.stat().st_size, path.name)))


def build_all() -> list[Built]:
    """Compile every source that has no library yet, a process for each core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(build, sources()))


def build(source: Path) -> Built:
    """The library of a source; compiles it unless this or another process did."""
    if found := find(source):
        return Built(source, found, 0.0)
    folder = _writable_folder()
    with _one_process(folder / f"{file_name(source)}.lock"):
        if found := find(source):
            return Built(source, found, 0.0)
        start = time.perf_counter()
        path = _compile(source, folder)
        seconds = time.perf_counter() - start
    logger.info("compiled %s in %.1f s", source.name, seconds)
    return Built(source, path, seconds)


def find(source: Path) -> Path | None:
    """The library of a source, if one is there and whole."""
    name = file_name(source)
    return next((folder / name for folder in folders() if _is_trusted(folder) and _is_whole(folder / name)), None)


def folders() -> tuple[Path, ...]:
    """Where libraries may be: the user's cache folder, and one for temporary files where that cannot be written."""
    found = []
    with contextlib.suppress(RuntimeError):  # no home
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = chosen if chosen.is_absolute() else Path.home() / ".cache"  # a relative one is no folder, by its owner
        found.append(cache / "kernel_index" / "native")
    with contextlib.suppress(OSError):  # nothing temporary can be written
        found.append(Path(tempfile.gettempdir()) / f"kernel_index-native-{os.getuid()}")
    return tuple(found)


def file_name(source: Path) -> str:
    return f"{source.stem}-{_key(source, source.stat().st_mtime_ns)}.so"


@functools.cache
def _key(source: Path, _modified: int) -> str:
    """A hash of all that a library depends on.  PyTorch's version is one: it has the functions that kernels call."""
    digest = hashlib.sha256(repr((flags(), torch.__version__)).encode())
    digest.update(_code(source).encode())
    return digest.hexdigest()[:16]


def flags() -> tuple[str, ...]:
    """The compiler's flags for this machine."""
    kind = vector_instructions()
    return FLAGS if kind is None else (ARCHITECTURES[kind], *FLAGS)


def _code(source: Path) -> str:
    kind = vector_instructions()
    headers = ("bfloat16.h", *(VECTORS[kind] if kind else ()), *HEADERS)
    return "".join(path.read_text(encoding="utf-8") for path in (*map(Path(__file__).with_name, headers), source))


def _compile(source: Path, folder: Path) -> Path:
    compiler = cxx_compiler()
    if compiler is None:
        raise CannotBuild(f"{source.name} cannot be compiled: {NO_COMPILER}")
    prefix = f".draft-{source.stem}-"
    for left in folder.glob(f"{prefix}*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as draft:
        code, made = Path(draft, source.name), Path(draft, "library.so")
        code.write_text(_code(source), encoding="utf-8")
        links = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
        done = subprocess.run([compiler, *flags(), str(code), "-o", str(made), *links], capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotBuild(f"{source.name} was not compiled by {compiler}:\n{done.stderr.strip()[-4000:]}")
        try:
            ctypes.CDLL(str(made))
        except OSError as error:  # this PyTorch lacks a function, or nothing may be executed in the folder
            raise CannotBuild(f"{source.name} was compiled and cannot be loaded: {error}") from error
        with made.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        return made.replace(folder / file_name(source))


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the hash of the rest; a loader ignores what follows a library."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _is_trusted(folder: Path) -> bool:
    """Whether nobody else can put a library there: everybody may make a folder among temporary files."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _writable_folder() -> Path:
    problems = []
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(str(error))
            continue
        if _is_trusted(folder):
            return folder
        problems.append(f"{folder} belongs to somebody else or is open to others")
    raise CannotBuild(f"no folder for compiled kernels: {'; '.join(problems)}")


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """One process of a machine compiles a source; a file system without locks costs a second compilation."""
    from filelock import FileLock  # comes with PyTorch; most processes build nothing

    lock = FileLock(path)
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
