"""The compiled part of updates and sums: built once for a machine, kept on disk, loaded without torch's headers."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

__all__ = ["Unavailable", "is_built", "library"]

SOURCE = Path(__file__).with_name("fused.cpp")
# Contraction is off because the source says itself what is fused: elements at the end of a tensor round like others.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
SECONDS = 120
"""Longest time that a compiler is given; it needs about three."""

_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The compiled part cannot be had here; the text says why."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The functions of ``fused.cpp``. Compiled at the first call on a machine, which is logged; then only loaded.

    What was compiled lies in ``$TORCH_EXTENSIONS_DIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``, under a name that tells
    source, flags and kind of processor, so that machines may share the folder. Where it lies no compiler is needed.

    Raises:
        Unavailable: There is no C++ compiler with OpenMP, or nowhere to keep what it makes.
    """
    built = _built()
    try:
        if not built.exists():
            _build(built)
        return _declared(ctypes.CDLL(str(built)))
    except OSError as error:
        raise Unavailable(str(error)) from error


def is_built() -> bool:
    """Whether ``library`` would only load."""
    return _built().exists()


def _built() -> Path:
    return _folder() / f"fused-{_digest()}.so"


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.phema_update.argtypes = (whole, whole, *(pointer,) * 5, number)
    loaded.phema_update.restype = None
    loaded.phema_finite.argtypes = (whole, *(pointer,) * 3, number)
    loaded.phema_finite.restype = number
    loaded.phema_sum.argtypes = (whole, pointer, number, pointer, whole, pointer, number, whole)
    loaded.phema_sum.restype = None
    return loaded


def _folder() -> Path:
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "sharded_phema"


def _digest() -> str:
    # Not the compiler: where one machine compiled, others of its kind need none.
    kind = (platform.system(), platform.machine(), *platform.libc_ver(), _features())
    return hashlib.blake2b(SOURCE.read_bytes() + repr((FLAGS, kind)).encode(), digest_size=10).hexdigest()


def _features() -> str:
    """What instructions the processor knows, in the words of the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = (line for line in lines if line.startswith(("flags", "Features")))
    return next(found, "") or platform.processor()  # which starts a process, and so is asked last


def _build(target: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), "")
    if not compiler:
        raise Unavailable("no C++ compiler is installed")
    _log.info("compiling fast updates and sums of averages with %s into %s, once", compiler, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may build at once: each for itself, and whoever renames last wins with the same contents.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        os.replace(made, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {SECONDS} s") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
