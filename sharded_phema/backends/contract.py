"""What every backend promises; `tests/contract.py` checks each of these sentences for each backend.

1. Names are those of the unwrapped model; a tied parameter appears once.
2. Over the pieces with ``replica == 0`` of all ranks, the boxes of a parameter are
   disjoint and cover it exactly; an empty piece is a legal piece.
3. ``local`` is live: after ``publish``, a write through it shows in the next forward.
4. ``local`` laid into ``boxes`` equals those slices of the whole parameter, bit for bit.
5. No collective is called, and the order of names is the same on every rank.
6. What cannot be mapped raises, naming the parameter, its placement and the mend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sharded_phema.layout import ShardLayout

__all__ = ["Backend"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way in which models are sharded.

    Attributes:
        name: For messages and records.
        knows: Whether this backend maps a given model.
        shard_layout: This rank's live pieces of the model's parameters.
        publish: Makes the next forward use what was written through ``local``.
    """

    name: str
    knows: Callable[[object], bool]
    shard_layout: Callable[[Any], ShardLayout]
    publish: Callable[[Any], None]
