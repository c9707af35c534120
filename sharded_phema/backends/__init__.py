"""Backends: where a kind of sharded model keeps its weights. One file each; nothing above asks which it is."""

from __future__ import annotations

from sharded_phema.backends import fsdp1, fsdp2, plain, zero
from sharded_phema.backends.contract import Backend
from sharded_phema.errors import UnsupportedModel

__all__ = ["Backend", "backend_of"]

# Asked in this order; plain takes what is sharded by nobody, so it comes last.
_BACKENDS = (zero.BACKEND, fsdp1.BACKEND, fsdp2.BACKEND, plain.BACKEND)


def backend_of(model: object, optimizer: object = None) -> Backend:
    """The first backend that knows ``model``.

    Args:
        model: A module, or an engine around it.
        optimizer: The optimizer, where the model does not tell who keeps its float32 masters.

    Raises:
        UnsupportedModel: None does.
    """
    for backend in _BACKENDS:
        if backend.knows(model, optimizer):
            return backend
    raise UnsupportedModel(
        f"expected a torch.nn.Module, plain or sharded with FSDP, or a DeepSpeed engine, "
        f"found {type(model).__qualname__}",
        hint="pass the module itself, or the engine that deepspeed.initialize returned",
    )
