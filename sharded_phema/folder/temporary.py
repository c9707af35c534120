"""Temporary files: a name that says which process writes them, and the proof that it is dead."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from functools import cache
from hashlib import blake2s

__all__ = ["Writer", "place_here", "temporary_name", "writer_of"]

PATTERN = re.compile(r"\..+\.([0-9a-f]{16})-([1-9][0-9]{0,8})-[0-9a-f]{16}\.tmp", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Writer:
    """A process that writes a temporary file: where process numbers mean the same, and its number there."""

    place: str
    pid: int

    @property
    def is_dead(self) -> bool:
        """Whether the process provably runs no more.

        That can be known only where it ran: on the same boot of the same machine, in the same container. A
        process that has taken its number since keeps it from being known.
        """
        if self.place != place_here():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:
            return False
        return False


def temporary_name(name: str) -> str:
    """A name, unlike any other, under which this process may write what ``name`` is to be."""
    return f".{name}.{place_here()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def writer_of(name: str) -> Writer | None:
    """Who writes a temporary file; None for a name that ``temporary_name`` does not give."""
    found = PATTERN.fullmatch(name)
    return Writer(found[1], int(found[2])) if found else None


@cache
def place_here() -> str:
    """This boot of this machine and this namespace of processes; something unlike any where these are not told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)
    return blake2s(f"{boot}{namespace}".encode(), digest_size=8).hexdigest()
