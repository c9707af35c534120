"""Averages of a Trainer's model as folders that ``from_pretrained`` opens."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharded_phema.errors import UnsupportedModel
from sharded_phema.per_tensor import Wanted
from sharded_phema.rebuild import reconstruct
from sharded_phema.world import from_first, rank_and_size

__all__ = ["check_exportable", "export_averages"]


def check_exportable(model: Any) -> None:
    """Prove that a model can be opened by ``from_pretrained`` alone.

    Raises:
        UnsupportedModel: It has no configuration, or consists of adapters.
    """
    if not hasattr(getattr(model, "config", None), "save_pretrained") or hasattr(model, "peft_config"):
        kind = "adapters of peft" if hasattr(model, "peft_config") else "no configuration"
        raise UnsupportedModel(
            f"export: {type(model).__name__} has {kind}, and from_pretrained could not open its averages",
            hint="leave export out; sharded-phema reconstruct writes the tensors alone",
        )


def export_averages(root: str, targets: Sequence[Wanted], out: str, model: Any, processing_class: Any) -> None:
    """Rebuild averages from a run's snapshots, each into a folder of ``out``. Collective: each rank writes its part.

    Args:
        root: Run folder.
        targets: What to rebuild.
        out: Folder to make; one that an earlier export made is replaced.
        model: Whose configuration is written beside the averages.
        processing_class: Tokenizer or processor, or None.

    Raises:
        PhemaError: A target cannot be rebuilt, or ``out`` not be written.
    """
    beside = from_first(lambda: _written(model, processing_class, Path(out).parent))
    try:
        reconstruct(root, targets, out=out, like=beside, force=True)
    finally:
        if rank_and_size()[0] == 0:
            shutil.rmtree(beside, ignore_errors=True)


def _written(model: Any, processing_class: Any, parent: Path) -> str:
    """What lies beside the weights of a model, in a new folder."""
    folder = tempfile.mkdtemp(prefix=".ema_config_", dir=parent)
    model = _inner(model)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 renames the classes of models
    config.save_pretrained(folder)
    _tell_float32(Path(folder, "config.json"))
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)
    return folder


def _inner(model: Any) -> Any:
    """The model without what torch.compile and FSDP1 put around it."""
    while inner := getattr(model, "_modules", {}).keys() & {"_orig_mod", "_fsdp_wrapped_module"}:
        model = model._modules[inner.pop()]
    return model


def _tell_float32(path: Path) -> None:
    """Have a configuration tell the dtype that is written, of which ``from_pretrained`` makes parameters."""
    config = json.loads(path.read_text())
    nested = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *nested):
        part.update({key: "float32" for key in ("dtype", "torch_dtype") if key in part})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
