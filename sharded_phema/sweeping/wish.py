"""Wish: the options of a sweep that have nothing to do with what is rebuilt, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sharded_phema.errors import OrderError
from sharded_phema.export import byte_count
from sharded_phema.sweeping.metric import Command
from sharded_phema.tally import Better

__all__ = ["Form", "SweepWish", "Towards"]

Form = Literal["state_dict", "folder", "model"]
"""What a metric is given."""

Towards = Literal["grid", "best", "per-tensor"]
"""Whether all targets are measured, the best width is searched, or one for each group of parameters."""


@dataclass(frozen=True, slots=True)
class SweepWish:
    """Options of ``sweep``; see there.

    Raises:
        OrderError: Some do not go together, or are none.
        OutputError: A size is none.
    """

    metric: Any
    form: Form | None
    has_model: bool
    like: str | Path | None
    dtype: str
    memory: str | int
    disk: str | int | None
    better: Better
    repeats: int
    groups: tuple[str, ...]
    has_base: bool
    towards: Towards
    evaluations: int

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.kind, get_args(Form)),
            ("better", self.better, get_args(Better)),
            ("towards", self.towards, get_args(Towards)),
        ):
            if value not in known:
                raise OrderError(f"{name}: expected one of {', '.join(known)}, found {value!r}", hint=f"try {known[0]}")
        for name, count in (("repeats", self.repeats), ("evaluations", self.evaluations)):
            if count < 1:
                raise OrderError(f"{name}: expected 1 or more, found {count}", hint="leave it out")
        for wrong, message, hint in self._contradictions():
            if wrong:
                raise OrderError(message, hint=hint)
        assert self.memory_bytes and (self.disk is None or self.disk_bytes)

    @property
    def kind(self) -> Form:
        """What the metric is given: as asked, or else what it can take."""
        return self.form or ("folder" if isinstance(self.metric, Command) else "state_dict")

    @property
    def memory_bytes(self) -> int:
        """Limit of one process."""
        return byte_count(self.memory)

    @property
    def disk_bytes(self) -> int | None:
        """Limit of rebuilt folders."""
        return None if self.disk is None else byte_count(self.disk)

    def checked(self, scores: Path, root: str | Path) -> Path:
        """The file of scores, which does not lie in the run folder.

        Raises:
            OrderError: It does, or is a URL.
        """
        if "://" in str(scores):
            raise OrderError(f"{scores}: expected a local file of scores, found a URL", hint="give a path on a disk")
        if "://" not in str(root) and scores.resolve().is_relative_to(Path(root).resolve()):
            raise OrderError(
                f"{scores} lies in the run folder, which holds snapshots and nothing else",
                hint="give --scores a file elsewhere",
            )
        return scores

    def _contradictions(self) -> tuple[tuple[bool, str, str], ...]:
        folders, command = self.kind == "folder", isinstance(self.metric, Command)
        return (
            (command and not folders, "a command is given a folder", "leave form out"),
            ((self.kind == "model") != self.has_model, "form model and a live model go together", "give both, or none"),
            (self.like is not None and not folders, "like: only folders have files beside them", "take form folder"),
            (self.dtype != "float32" and not folders, "dtype: only folders have one", "take form folder"),
            (bool(self.groups) != self.has_base, "groups need a base, and a base groups", "give --group and --base"),
            (
                self.towards == "per-tensor" and not self.groups,
                "a search per tensor needs groups of parameters, and a base to start from",
                "for example --group '*.attn.*' --group '*.mlp.*' --base 0.12",
            ),
        )
