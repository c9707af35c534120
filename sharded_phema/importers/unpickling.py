"""Unpickling without running anything: tensors and constants come out, every other global is refused by its name."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

from sharded_phema.errors import PhemaError, StoreError

__all__ = ["Inert", "Stand", "inert", "sealed", "unpickled"]


class Inert:
    """What stands in the place of a foreign object: the name of its class, its arguments and its state.

    No method of it does anything but keep what it is given.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str, *default: Any) -> Any:
        """An attribute of the foreign object, or the default where it has none of its own.

        Raises:
            StoreError: It has none of that name, and there is no default.
        """
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        if default:
            return default[0]
        raise StoreError(
            f"a pickled {self.name} holds no {name}", hint="another version of the package wrote it, or it was edited"
        )


class Stand(Protocol):
    """What stands in the place of a global: called as that would be, with what was pickled."""

    def __call__(self, *args: Any) -> Any:
        """What the global would give, or something that stands in its place."""


class _Sealed:
    """A function that a pickle may call and nothing else: no attribute of it can be set."""

    __slots__ = ("_act",)
    _act: Stand

    def __init__(self, act: Stand) -> None:
        object.__setattr__(self, "_act", act)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        return self._act(*args)


class _SealedType(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(name)


def inert(name: str) -> Any:
    """A class whose objects are ``Inert``, however a pickle makes them."""

    def made(cls: type, *args: Any) -> Inert:
        return Inert(name, args)

    return _SealedType(name, (), {"__slots__": (), "__new__": made})


def sealed(kind: type) -> Any:
    """A class like another, of which no attribute can be set."""
    return _SealedType("sealed", (kind,), {"__slots__": ()})


_CONSTANTS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _Sealed(lambda text, code: _bytes_of(text, code)),
}


class _Unpickler(pickle.Unpickler):
    """The unpickler of the library, which loads nothing by name that is not in a table."""

    def __init__(
        self,
        file: BinaryIO,
        where: str,
        allowed: Mapping[tuple[str, str], Any],
        known: Callable[[str, str], bool],
        persistent: Stand,
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._where, self._known, self._persistent = where, known, persistent
        self._allowed = {**_CONSTANTS, **allowed}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if self._known(module, name):
            return inert(f"{module}.{name}")
        raise StoreError(
            f"{self._where}: its pickle asks for {module}.{name}, which is none of what weights are made of",
            hint="nothing was executed; if you trust the file, save its state dict anew with torch.save",
        )

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def unpickled(
    file: BinaryIO,
    where: str,
    *,
    allowed: Mapping[tuple[str, str], Stand] = MappingProxyType({}),
    known: Callable[[str, str], bool] = lambda module, name: False,
    persistent: Stand | None = None,
) -> Any:
    """The object of the pickle at which a file stands. Nothing is imported, and nothing is called but what is given.

    Args:
        file: Where to read.
        where: Its name, for people.
        allowed: What stands for globals, by module and name.
        known: Which other classes are taken as ``Inert``.
        persistent: What stands for what the pickle stores outside of itself.

    Raises:
        StoreError: It asks for anything else, or is no pickle.
    """
    stands = {key: stand if isinstance(stand, type | str) else _Sealed(stand) for key, stand in allowed.items()}
    try:
        return _Unpickler(file, where, stands, known, persistent or _refuse_persistent).load()
    except PhemaError:
        raise
    except Exception as error:  # whatever a damaged or malicious pickle makes of the unpickler
        raise StoreError(
            f"{where}: is no pickle that can be read: {type(error).__name__}: {error}",
            hint="the file is damaged, or of another format; nothing was executed",
        ) from error


def _refuse_persistent(pid: Any) -> Any:
    raise StoreError(
        f"its pickle refers to {str(pid)[:80]!r} outside of itself", hint="the file is damaged, or of another format"
    )


def _bytes_of(text: Any, code: Any) -> bytes:
    if not isinstance(text, str) or code not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {code!r}")
    return text.encode("latin1")
