"""Winner: how the best average of a sweep is asked for again, as lines of a shell and as targets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from sharded_phema.spelling import spelled
from sharded_phema.tally import Entry
from sharded_phema.target import Target, parse_target, parse_targets

__all__ = ["rebuild_lines", "targets_of"]


def rebuild_lines(best: Entry, root: str) -> tuple[str, ...]:
    """Lines of a shell that rebuild an average into the folder ``best``.

    Args:
        best: Which.
        root: The run folder, as it is to be written there.
    """
    start = ["sharded-phema", "reconstruct", root]
    if best.first.group is None:
        return (shlex.join([*start, _timed(best.first.target, best), "--out", "best"]),)
    text = json.dumps(_patterns(best))
    return (
        "cat > best.json <<'END'",
        *(text, "END"),
        shlex.join([*start, "--per-tensor", "best.json", "--out", "best"]),
    )


def targets_of(best: Entry) -> tuple[Target, ...]:
    """What its parameters are rebuilt as: one target, or one for each of several parts, each with its time."""
    alone = best.first.group is None
    return parse_targets(dict.fromkeys([_timed(best.first.target, best)] if alone else _patterns(best).values()))


def _patterns(best: Entry) -> dict[str, str]:
    """Targets by pattern, the group's first: the base is one target for all others, or has patterns itself."""
    group, base = best.first.group or "*", best.first.base or ""
    others: Mapping[str, Any] = json.loads(base) if base.startswith("{") else {"*": base} if base else {}
    parts = {group: best.first.target} | {pattern: text for pattern, text in others.items() if pattern != group}
    return {pattern: _timed(str(text), best) for pattern, text in parts.items()}


def _timed(text: str, best: Entry) -> str:
    """A target with its training time: a run that goes on has another last snapshot."""
    return f"{parse_target(text).text}@t={spelled(best.first.t)}"
