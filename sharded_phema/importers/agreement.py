"""Agreement: what all checkpoints of one run have in common, and the first difference where they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import xxhash

from sharded_phema.errors import ModelMismatch, StoreError
from sharded_phema.importers.contract import Foreign, Lazy, Tensors
from sharded_phema.manifest import Parameter, RawTensor
from sharded_phema.rounding import STORED_BYTES
from sharded_phema.tensorfile import CODES

__all__ = ["Model", "agreed", "check_open", "check_same", "check_times", "identity_of", "model_of"]

# Counts, not weights, also where a package stores them as numbers of another kind.
_COUNTS = "*num_batches_tracked"
_AVERAGED = (*STORED_BYTES, "float64")


@dataclass(frozen=True, slots=True)
class Model:
    """What a run of the checkpoints holds.

    Attributes:
        averages: Labels of its averages.
        dtype: What they are stored in: the dtype of the tensors where all have the same, else float32.
        parameters: Tensors that are averaged.
        copied: Tensors that are stored as they are.
        dtypes: Dtype of every tensor in the files.
    """

    averages: tuple[str, ...]
    dtype: str
    parameters: tuple[Parameter, ...]
    copied: tuple[RawTensor, ...]
    dtypes: Mapping[str, str]


def agreed(checkpoints: Sequence[Foreign], copy: Sequence[str] = ()) -> Model:
    """The model of all checkpoints. Reads headers, no tensors.

    Args:
        checkpoints: In order of time.
        copy: Patterns of names of tensors that are copied.

    Raises:
        StoreError: Two are of the same time, or a tensor has a dtype that cannot be averaged.
        ModelMismatch: They are not of one model, or do not hold the same averages; says the first difference.
    """
    check_times(checkpoints)
    first = checkpoints[0]
    model, opened = model_of(first, copy)
    for other in checkpoints[1:]:
        check_open(model, opened[model.averages[0]], first.where, other)
    return model


def check_times(checkpoints: Sequence[Foreign]) -> None:
    """Prove that each checkpoint, in order of time, is of a time of its own.

    Raises:
        StoreError: Two are of the same.
    """
    for one, other in pairwise(checkpoints):
        if one.t >= other.t:
            raise StoreError(
                f"{one.where} and {other.where} are both of training time {one.t:g}",
                hint="leave one of them out, or say where the time stands in their names with --time-pattern",
            )


def model_of(checkpoint: Foreign, copy: Sequence[str]) -> tuple[Model, Mapping[str, Tensors]]:
    """The model of one checkpoint, and its averages. Reads headers, no tensors.

    Raises:
        StoreError: As of ``agreed``.
        ModelMismatch: Its averages are not of one model.
    """
    opened = checkpoint.open()
    label = next(iter(opened))
    model = _model(tuple(opened), opened[label], checkpoint.where, copy)
    for average, tensors in opened.items():
        check_same(opened[label], tensors, f"{checkpoint.where} ({label})", f"{checkpoint.where} ({average})")
    return model, opened


def identity_of(checkpoints: Sequence[Foreign], model: Model, unit: str, **more: object) -> str:
    """The same for the same files, read alike: so that what was interrupted is known again."""
    files = [(one.where, one.t, one.start, one.size) for one in checkpoints]
    facts = {"files": files, "unit": unit, **more, **asdict(model)}
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, default=str).encode())


def check_open(model: Model, tensors: Tensors, where: str, other: Foreign) -> Mapping[str, Tensors]:
    """A checkpoint's averages, proved to be of a model.

    Raises:
        ModelMismatch: They are not.
    """
    opened = other.open()
    if tuple(opened) != model.averages:
        raise ModelMismatch(
            f"{other.where} holds the averages {', '.join(opened)}; {where} holds {', '.join(model.averages)}",
            hint="import checkpoints that hold the same averages, each kind into a run folder of its own",
        )
    for average in opened.values():
        check_same(tensors, average, where, other.where)
    return opened


def check_same(expected: Tensors, found: Tensors, there: str, here: str) -> None:
    """Prove that two checkpoints hold tensors of the same names, shapes and dtypes.

    Raises:
        ModelMismatch: They do not; says the first difference.
    """
    missing = [name for name in expected if name not in found] or [name for name in found if name not in expected]
    differing = [name for name in expected if name in found and _facts(expected[name]) != _facts(found[name])]
    if missing:
        has, lacks = (there, here) if missing[0] in expected else (here, there)
        difference = f"{has} holds {missing[0]}, {lacks} does not ({len(missing)} tensors differ so)"
    elif differing:
        name = differing[0]
        difference = f"{name} is {_text(found[name])} in {here}, and {_text(expected[name])} in {there}"
    else:
        return
    raise ModelMismatch(
        difference, hint="they are of two models: keep the checkpoints of each run in a folder of their own"
    )


def _model(labels: tuple[str, ...], tensors: Tensors, where: str, copy: Sequence[str]) -> Model:
    patterns = (*copy, _COUNTS)
    kept = {
        name: lazy
        for name, lazy in tensors.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns) or not _is_number(lazy)
    }
    for name, lazy in kept.items():
        if lazy.dtype not in CODES:
            raise StoreError(f"{where}: {name} is of {lazy.dtype}", hint="it cannot be stored; leave it out")
    averaged = {name: lazy for name, lazy in tensors.items() if name not in kept}
    for name, lazy in averaged.items():
        if lazy.dtype not in _AVERAGED:
            raise StoreError(
                f"{where}: {name} is of {lazy.dtype}, which cannot be averaged",
                hint=f"copy it with --copy {name}, or import checkpoints in one of {', '.join(_AVERAGED)}",
            )
    if not averaged:
        raise StoreError(f"{where}: holds no tensor that can be averaged", hint="choose others with --key, --prefix")
    dtypes = {lazy.dtype for lazy in averaged.values()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= set(STORED_BYTES) else "float32"
    raw = tuple(RawTensor(name, lazy.shape, lazy.dtype, "buffer") for name, lazy in kept.items())
    parameters = tuple(Parameter(name, lazy.shape) for name, lazy in averaged.items())
    return Model(labels, dtype, parameters, raw, {name: lazy.dtype for name, lazy in tensors.items()})


def _is_number(lazy: Lazy) -> bool:
    """Whether a tensor holds real or complex numbers rather than counts and flags."""
    return lazy.dtype.startswith(("float", "bfloat", "complex"))


def _facts(lazy: Lazy) -> tuple[tuple[int, ...], str]:
    return lazy.shape, lazy.dtype


def _text(lazy: Lazy) -> str:
    return f"{lazy.dtype} of shape {lazy.shape}"
