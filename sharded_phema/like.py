"""Like: what lies beside the weights of a model in the manner of Hugging Face, copied beside rebuilt ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from sharded_phema.errors import OutputError

__all__ = ["check_like", "copy_configuration", "stem_of"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".distcp", ".lock")
OURS = "phema.json"


def check_like(like: Path, names: Iterable[str]) -> None:
    """Prove that a folder holds a model's configuration, and, where it holds safetensors, tensors of the same names.

    Args:
        like: The folder.
        names: Of the rebuilt tensors.

    Raises:
        OutputError: It does not.
    """
    if not (like / "config.json").is_file():
        is_pipeline = (like / "model_index.json").is_file()
        raise OutputError(
            f"{like}: expected the folder of a model with config.json, found {'a pipeline' if is_pipeline else 'none'}",
            hint="give --like the folder of the part that was trained, such as unet"
            if is_pipeline
            else "give --like the folder that save_pretrained wrote",
        )
    theirs = set(_tensors(like))
    # A tied tensor may be stored under one of its names or under several.
    if theirs and (missing := sorted(theirs - set(names))) and len(missing) == len(theirs):
        raise OutputError(
            f"{like}: none of its {len(theirs)} tensors, such as {missing[0]}, has the name of one of the run",
            hint="give --like the folder of the same model, saved as it was trained",
        )


def stem_of(like: Path) -> str:
    """What names of weight files begin with beside such a configuration: diffusers looks for other ones.

    Raises:
        OutputError: The configuration cannot be read.
    """
    path = like / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}", hint="give --like another folder") from error
    return "diffusion_pytorch_model" if isinstance(found, dict) and "_diffusers_version" in found else "model"


def copy_configuration(like: Path, folder: Path) -> None:
    """Copy all but the weights: configuration, tokenizer, code that belongs to the model.

    Raises:
        OutputError: A file cannot be copied.
    """
    for source in _beside(like):
        target = folder / source.relative_to(like)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise OutputError(
                f"{source}: cannot be copied to {target}: {error}", hint="check free space and permissions"
            ) from error


def _beside(like: Path) -> Iterator[Path]:
    for path in sorted(like.iterdir()):
        hidden = path.name.startswith(".") or path.name == OURS
        if path.is_file() and not hidden and not path.name.endswith((*WEIGHTS, ".index.json")):
            yield path


def _tensors(like: Path) -> Iterator[str]:
    """Names of the tensors in a folder's safetensors files."""
    for path in sorted(like.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                names = json.loads(file.read(length))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be read: {error}", hint="give --like another folder") from error
        yield from (name for name in names if name != "__metadata__")
