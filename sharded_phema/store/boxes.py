"""Boxes of a global tensor as torch.distributed.checkpoint takes them, from any backend, without a gather."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sharded_phema.errors import OrderError
from sharded_phema.layout import Box, ParamShard

__all__ = ["BoxTensor", "pieces_in", "pieces_of"]


class BoxTensor(Tensor):
    """A tensor of global shape of which only some boxes are here, each an alias of local storage.

    It implements the methods by which ``torch.distributed.checkpoint`` asks a
    sharded tensor for its pieces, so that ``dcp.save`` writes them and ``dcp.load``
    fills them in place, for any cut into boxes. It has no arithmetic.
    """

    pieces: dict[torch.Size, Tensor]  # by offsets

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], pieces: dict[torch.Size, Tensor], like: Tensor) -> BoxTensor:
        """Wrap ``pieces``, keyed by their offsets, as a tensor of ``shape`` with dtype and device of ``like``."""
        wrapper: BoxTensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=like.dtype, device=like.device)
        wrapper.pieces = pieces
        return wrapper

    @classmethod
    def of(cls, shard: ParamShard) -> BoxTensor:
        """The boxes of a shard; writing into them writes into ``shard.local``, which must be contiguous."""
        return cls(shard.global_shape, pieces_in(shard.local.view(-1), shard.boxes), shard.local)

    def __copy__(self) -> BoxTensor:
        return BoxTensor(tuple(self.shape), self.pieces, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoxTensor:
        return BoxTensor(tuple(self.shape), copy.deepcopy(self.pieces, memo), self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: ``torch.save`` of one rank would lose what is on the others.

        Raises:
            OrderError: Always.
        """
        raise OrderError(
            f"torch.save or pickle of averages of which only a part is on this rank: {self!r}",
            hint="save the state with torch.distributed.checkpoint: dcp.save({'ema': ema}, checkpoint_id=...)",
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """An alias can be made, or a frame for other pieces; whatever else is asked of a tensor needs all of it."""
        if func is torch.ops.aten.detach.default:
            return cls(tuple(args[0].shape), args[0].pieces, args[0])
        if func is torch.ops.aten.new_empty.default:
            # dcp.async_save copies a tensor so: it makes an empty one, and then fills copies of our pieces in.
            device = (kwargs or {}).get("device", args[0].device)
            return cls(tuple(args[1]), {}, torch.empty(0, dtype=args[0].dtype, device=device))
        raise TypeError(f"{func} needs the whole tensor, and only some of its boxes are on this rank")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and the boxes that are here."""
        return f"BoxTensor({tuple(self.shape)}, boxes at {[tuple(offsets) for offsets in self.pieces]})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.size()) for offsets, piece in self.pieces.items()]

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        # index.index counts the chunks of all ranks on save and of this rank on load; offsets mean one thing.
        assert index.offset is not None
        return self.pieces[index.offset]


def pieces_in(flat: Tensor, boxes: Sequence[Box]) -> dict[torch.Size, Tensor]:
    """What a flat tensor, which holds boxes end to end, has of each, by offsets: aliases."""
    pieces = torch.split(flat, [box.numel for box in boxes]) if boxes else ()
    return {torch.Size(box.offsets): piece.view(box.sizes) for box, piece in zip(boxes, pieces, strict=True)}


def pieces_of(shard: ParamShard) -> dict[torch.Size, Tensor]:
    """What a shard of any strides holds of each of its boxes, by offsets, to be read only."""
    if len(shard.boxes) == 1:
        return {torch.Size(shard.boxes[0].offsets): shard.local.reshape(shard.boxes[0].sizes)}
    return pieces_in(shard.local.reshape(-1), shard.boxes)
