"""Where a run folder keeps what. Nothing is ever read out of a name: the records hold the facts."""

from __future__ import annotations

__all__ = [
    "CLAIMS",
    "FROZEN",
    "LAYOUTS",
    "RUN",
    "SESSIONS",
    "SNAPSHOTS",
    "box_key",
    "claim_file",
    "copied_name",
    "frozen_files",
    "layout_file",
    "session_file",
    "snapshot_file",
    "snapshot_folder",
    "tensor_name",
    "tensors_file",
]

RUN = "run.json"
CLAIMS, FROZEN, LAYOUTS, SESSIONS, SNAPSHOTS = "claims", "frozen", "layouts", "sessions", "snapshots"


def claim_file(number: int) -> str:
    """The claim of a process to go on with the run."""
    return f"{CLAIMS}/{number:06d}.json"


def session_file(session: str) -> str:
    """A session's record."""
    return f"{SESSIONS}/{session}.json"


def layout_file(layout: str) -> str:
    """A layout's record."""
    return f"{LAYOUTS}/{layout}.json"


def snapshot_folder(session: str, snapshot: int) -> str:
    """Folder of one snapshot."""
    return f"{SNAPSHOTS}/{session}-{snapshot:06d}"


def snapshot_file(folder: str) -> str:
    """The record that commits a snapshot, in its folder."""
    return f"{folder}/snapshot.json"


def tensors_file(folder: str, rank: int) -> str:
    """A rank's tensors of one snapshot."""
    return f"{folder}/rank-{rank:05d}.safetensors"


def frozen_files(session: str, number: int, rank: int) -> tuple[str, str]:
    """A rank's frozen tensors as one of its stores in a session, and the record that commits them."""
    folder = f"{FROZEN}/{session}-{number:06d}"
    return tensors_file(folder, rank), f"{folder}/rank-{rank:05d}.json"


def tensor_name(average: str, parameter: str) -> str:
    """Name of one parameter of one average, as torch.distributed.checkpoint flattens nested state dicts."""
    return f"{average}.{parameter}"


def copied_name(tensor: str) -> str:
    """Name of a copied tensor; no average's, because none is spelled so."""
    return f"copied:{tensor}"


def box_key(tensor: str, box: int) -> str:
    """Key inside a rank's tensor file of one of the boxes that the rank holds of a tensor."""
    return f"{tensor}:{box}"
