"""Where a run folder keeps what. Nothing is ever read out of a name: the records hold the facts."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "box_key",
    "copied_name",
    "frozen_files",
    "frozen_paths",
    "layout_path",
    "part_path",
    "part_paths",
    "run_path",
    "run_root",
    "session_path",
    "session_paths",
    "snapshot_folder",
    "snapshot_folders",
    "tensor_name",
    "tensors_path",
]


def run_path(root: Path) -> Path:
    """The run's record."""
    return root / "run.json"


def session_path(root: Path, session: str) -> Path:
    """A session's record."""
    return root / "sessions" / f"{session}.json"


def layout_path(root: Path, session: str, rank: int) -> Path:
    """The boxes that a rank stores throughout a session."""
    return root / "sessions" / session / f"layout-{rank:05d}.json"


def snapshot_folder(root: Path, session: str, snapshot: int) -> Path:
    """Folder of one snapshot."""
    return root / "snapshots" / f"{session}-{snapshot:06d}"


def frozen_paths(root: Path, session: str, number: int, rank: int) -> tuple[Path, Path]:
    """A rank's frozen tensors as one of its stores in a session, and the record that commits them."""
    folder = root / "frozen" / f"{session}-{number:06d}"
    return tensors_path(folder, rank), part_path(folder, rank)


def frozen_files(root: Path) -> list[Path]:
    """All files of frozen tensors, in a fixed order."""
    return sorted((root / "frozen").glob("*/rank-*.safetensors"))


def run_root(snapshot: Path) -> Path:
    """The run folder of a snapshot's folder."""
    return snapshot.parents[1]


def session_paths(root: Path) -> list[Path]:
    """Records of all sessions, in a fixed order."""
    return sorted((root / "sessions").glob("*.json"))


def snapshot_folders(root: Path) -> list[Path]:
    """Folders of all snapshots, finished or not, in a fixed order."""
    return sorted(path for path in (root / "snapshots").glob("*") if path.is_dir())


def part_paths(folder: Path) -> list[Path]:
    """Records of the parts that are committed in a snapshot's folder, in rank order."""
    return sorted(folder.glob("rank-*.json"))


def tensors_path(folder: Path, rank: int) -> Path:
    """A rank's tensors of one snapshot."""
    return folder / f"rank-{rank:05d}.safetensors"


def part_path(folder: Path, rank: int) -> Path:
    """The record that commits a rank's tensors."""
    return folder / f"rank-{rank:05d}.json"


def tensor_name(average: str, parameter: str) -> str:
    """Name of one parameter of one average, as torch.distributed.checkpoint flattens nested state dicts."""
    return f"{average}.{parameter}"


def copied_name(tensor: str) -> str:
    """Name of a copied tensor; no average's, because none is spelled so."""
    return f"copied:{tensor}"


def box_key(tensor: str, box: int) -> str:
    """Key inside a rank's tensor file of one of the boxes that the rank holds of a tensor."""
    return f"{tensor}:{box}"
