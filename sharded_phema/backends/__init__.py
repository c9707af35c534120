"""Backends: where a kind of sharded model keeps its weights. One file each; nothing above asks which it is."""

from __future__ import annotations

from sharded_phema.backends import fsdp2, plain
from sharded_phema.backends.contract import Backend
from sharded_phema.errors import UnsupportedModel

__all__ = ["Backend", "backend_of"]

# Asked in this order; plain takes what is sharded by nobody, so it comes last.
_BACKENDS = (fsdp2.BACKEND, plain.BACKEND)


def backend_of(model: object) -> Backend:
    """The first backend that knows ``model``.

    Raises:
        UnsupportedModel: None does.
    """
    for backend in _BACKENDS:
        if backend.knows(model):
            return backend
    raise UnsupportedModel(
        f"expected a torch.nn.Module, plain or sharded with fully_shard, found {type(model).__qualname__}",
        hint="pass the module itself; FSDP1 wrappers and DeepSpeed engines are not supported yet",
    )
