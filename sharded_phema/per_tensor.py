"""Per tensor: which average each parameter of one output is rebuilt as, by patterns of parameter names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sharded_phema.errors import TargetError
from sharded_phema.target import Target, parse_target

__all__ = ["Output", "Wanted", "parse_outputs", "read_patterns", "whole_model"]

Wanted = str | float | Mapping[str, str | float]
"""A target, or targets by patterns of parameter names."""

_EXAMPLE = '{"*.attn.*": 0.05, "*": 0.12}'
_PATTERNS = "patterns are those of file names, such as *.attn.*, and the first that matches counts"


@dataclass(frozen=True, slots=True)
class Output:
    """One rebuilt model; made by ``parse_outputs`` or ``whole_model``.

    Attributes:
        slug: Name of its folder.
        patterns: Pattern of parameter names and target, in order; the first match counts.
        uniform: Whether it was asked for as one target.
    """

    slug: str
    patterns: tuple[tuple[str, Target], ...]
    uniform: bool

    def choice(self, names: Sequence[str]) -> tuple[Target, ...]:
        """Target of each parameter.

        Raises:
            TargetError: A parameter matches no pattern, or a pattern no parameter.
        """
        for pattern, _ in self.patterns:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise TargetError(
                    f"{self.slug}: pattern {pattern!r} matches none of {len(names)} parameters, such as {names[0]}",
                    hint=f"{_PATTERNS}; leave it out if it is not meant",
                )
        return tuple(self._target(name) for name in names)

    def _target(self, name: str) -> Target:
        for pattern, target in self.patterns:
            if fnmatchcase(name, pattern):
                return target
        raise TargetError(
            f"{self.slug}: parameter {name} matches none of the patterns {[pattern for pattern, _ in self.patterns]}",
            hint=f'{_PATTERNS}; end with "*" for all others',
        )


def whole_model(target: Target) -> Output:
    """The output that rebuilds every parameter as the same average."""
    return Output(target.slug, (("*", target),), uniform=True)


def parse_outputs(wanted: Sequence[Wanted] | Mapping[str, str | float]) -> tuple[Output, ...]:
    """Outputs in the order given; a mapping alone is one output.

    Raises:
        TargetError: A bad target, an empty mapping, no output at all, or two that are the same.
    """
    if isinstance(wanted, str):
        raise TargetError(f"targets: expected a list, found the text {wanted!r}", hint=f"write [{wanted!r}]")
    outputs: list[Output] = []
    mapped = 0
    for item in [wanted] if isinstance(wanted, Mapping) else wanted:
        mapped += isinstance(item, Mapping)
        outputs.append(_mapped(item, mapped) if isinstance(item, Mapping) else whole_model(parse_target(item)))
    if not outputs:
        raise TargetError("no target: at least one is expected", hint="for instance 0.12")
    seen: set[tuple[object, bool]] = set()
    for output in outputs:
        if (output.patterns, output.uniform) in seen:
            text = output.patterns[0][1].text if output.uniform else output.slug
            raise TargetError(f"target {text!r} is asked for twice", hint="name every target once")
        seen.add((output.patterns, output.uniform))
    return tuple(outputs)


def read_patterns(path: Path) -> dict[str, str | float]:
    """Targets by patterns of parameter names, from a JSON file.

    Raises:
        TargetError: The file cannot be read, or holds no such object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TargetError(f"{path}: cannot be read: {error}", hint=f"expected {_EXAMPLE}") from error
    if not isinstance(found, dict):
        raise TargetError(f"{path}: expected targets by pattern, found {found!r:.50}", hint=f"expected {_EXAMPLE}")
    return found


def _mapped(targets: Mapping[str, str | float], number: int) -> Output:
    if not targets:
        raise TargetError("targets by pattern: the mapping is empty", hint=f"for instance {_EXAMPLE}")
    slug = "per-tensor" if number == 1 else f"per-tensor-{number}"
    return Output(slug, tuple((pattern, parse_target(text)) for pattern, text in targets.items()), uniform=False)
