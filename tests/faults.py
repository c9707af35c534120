"""Faults of local storage: a process that is killed at any system call, and calls that fail.

A module under test makes its system calls through its name ``os``. That name is replaced by a stand-in that
counts calls in their order and interferes with one of them. What a call count means is only
clear where one thread makes them.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import sharded_phema.folder.disk
import sharded_phema.folder.local
import sharded_phema.folder.local_file

MODULES = (sharded_phema.folder.local, sharded_phema.folder.disk, sharded_phema.folder.local_file)

NO_CALLS = {"fspath", "getpid"}
"""Functions of ``os`` that ask the system for nothing that can fail."""


class CountedOs:
    """Stands in for the module ``os``: every function that is called through it is told to ``before`` first."""

    def __init__(self, before: Callable[[str, tuple[Any, ...]], None]) -> None:
        self._before = before

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if not callable(real) or isinstance(real, type) or name in NO_CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(name, args)
            return real(*args, **kwargs)

        return call


@contextmanager
def counted(before: Callable[[str, tuple[Any, ...]], None], modules: Sequence[ModuleType] = MODULES) -> Iterator[None]:
    """Have ``before`` called with the name and the arguments of each system call, just before it is made."""
    try:
        for module in modules:
            module.os = CountedOs(before)  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.os = os  # type: ignore[attr-defined]


def calls_of(fn: Callable[[], object], modules: Sequence[ModuleType] = MODULES) -> list[str]:
    """Run ``fn`` here, and name the system calls that it made."""
    made: list[str] = []
    with counted(lambda name, args: made.append(name), modules):
        fn()
    return made


def failing_at(fn: Callable[[], object], k: int, errno: int, modules: Sequence[ModuleType] = MODULES) -> str:
    """Run ``fn`` here while its ``k``-th call, counted from 0, fails with ``errno``; that call is not made.

    Returns:
        Name of the call; empty where ``fn`` made no more than ``k``. What ``fn`` raises passes through.
    """
    made: list[str] = []

    def before(name: str, args: tuple[Any, ...]) -> None:
        made.append(name)
        if len(made) == k + 1:
            raise OSError(errno, os.strerror(errno))

    with counted(before, modules):
        fn()
    return made[k] if k < len(made) else ""


def kill_points(fn: Callable[[], object], modules: Sequence[ModuleType] = MODULES) -> int:
    """How many moments there are at which ``killed_at`` can kill ``fn``, which is run in a child to count them."""
    reader, writer = os.pipe()

    def counting() -> None:
        count = 0

        def before(name: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            count += len(_moments(name))

        with counted(before, modules):
            fn()
        os.write(writer, b"%d" % count)

    try:
        assert not _was_killed(_forked(counting))
        return int(os.read(reader, 100))
    finally:
        os.close(reader)
        os.close(writer)


def killed_at(fn: Callable[[], object], k: int, modules: Sequence[ModuleType] = MODULES) -> bool:
    """Run ``fn`` in a child that is killed with SIGKILL at its ``k``-th moment, counted from 0.

    Each system call has a moment, just before it. A write has a second one, when half of its bytes are written.

    Returns:
        Whether it came to that; if not, ``fn`` ended as it should.
    """

    def dying() -> None:
        passed = 0

        def before(name: str, args: tuple[Any, ...]) -> None:
            nonlocal passed
            for half in _moments(name):
                if passed == k:
                    if half:
                        os.write(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1

        with counted(before, modules):
            fn()

    return _was_killed(_forked(dying))


def in_child(fn: Callable[[], object]) -> None:
    """Run ``fn`` in a child, so that limits which it sets end with it; what it raises fails the test."""
    assert not _was_killed(_forked(fn))


def _moments(name: str) -> tuple[bool, ...]:
    """The moments of a call: whether half of it is done."""
    return (False, True) if name == "write" else (False,)


def _forked(fn: Callable[[], object]) -> int:
    """Run ``fn`` in a child, and give how it ended."""
    child = os.fork()
    if child == 0:
        # Nothing of the parent, such as its test runner, may run on in the child.
        status = 1
        try:
            fn()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _was_killed(code: int) -> bool:
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}; its traceback stands above"
    return code != 0
