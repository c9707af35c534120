"""What every backend promises; `tests/contract.py` checks each of these sentences for each backend.

1. Names are those of the unwrapped model; a tied parameter appears once.
2. What this rank holds, whoever else holds it too: over all ranks the different sets of boxes of a
   tensor are disjoint and cover it exactly; an empty piece is a legal piece.
3. ``local`` is live: after ``publish``, a write through it shows in the next forward. It is the float32
   master where the backend keeps one.
4. ``local`` laid into ``boxes`` equals those slices of the whole tensor, bit for bit.
5. ``shard_layout`` calls no collective, and the order of names is the same on every rank: parameters, then
   persistent buffers.
6. ``steps`` calls no collective, grows by one with each step that changes the weights, and is the same on every rank.
7. What cannot be mapped raises, naming the parameter, its placement and the mend.

Which of several ranks that hold the same boxes writes them is not a backend's business: see ``replicas``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sharded_phema.layout import ParamShard, ShardLayout, TensorKind, canonical_name, whole

__all__ = ["Backend", "held_whole", "kind_of", "persistent_buffers", "uncounted"]


def uncounted(model: object, optimizer: object) -> None:
    """Who steps the optimizer counts the steps."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way in which models are sharded.

    Each function takes the model, or the engine around it, and the optimizer that the user gave (None without one).

    Attributes:
        name: For messages and records.
        knows: Whether this backend maps a given model.
        shard_layout: This rank's live pieces of the model's parameters and persistent buffers.
        publish: Makes the next forward use what was written through ``local``. Called by every rank; may communicate.
        steps: How many optimizer steps changed the weights so far; None where the model does not count them.
    """

    name: str
    knows: Callable[[object, object], bool]
    shard_layout: Callable[[Any, Any], ShardLayout]
    publish: Callable[[Any, Any], None]
    steps: Callable[[Any, Any], int | None] = uncounted


def kind_of(param: nn.Parameter) -> TensorKind:
    """What a parameter is to the training as it stands."""
    return "trained" if param.requires_grad else "frozen"


def held_whole(path: str, kind: TensorKind, current: Callable[[], Tensor]) -> ParamShard:
    """The piece of a tensor that this rank holds whole, at a path in the wrapped model."""
    local = current()
    shape = tuple(local.shape)
    return ParamShard(canonical_name(path), shape, (whole(shape),), local, current, kind)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Paths of the buffers that a state dict of the module would hold, tied ones once. No hook is run."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer
