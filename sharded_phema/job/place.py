"""Place of an output: what may stand there, what takes its place, and nothing of it lost or removed by halves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sharded_phema.errors import OutputError
from sharded_phema.folder.disk import flush
from sharded_phema.folder.temporary import temporary_name, writer_of

__all__ = ["FORMAT", "check_free", "clear", "failing", "flush_tree", "is_ours", "mend", "names", "put", "renamed"]

FORMAT = "sharded_phema rebuilt average"
"""What ``phema.json`` says in each folder of an output of ours."""

NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}
"""How systems refuse to rename a folder to the name of one that is not empty."""


@contextmanager
def failing(out: Path) -> Iterator[None]:
    """Turn what the system reports into one error."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{out} cannot be made: {error}",
            hint="check free space and permissions; the same command then goes on where it stopped",
        ) from error


def names(folder: Path) -> list[str]:
    """Names in a folder; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def renamed(path: Path, to: Path) -> bool:
    """Rename what may be gone; whether it was there, and the place free of anything but an empty folder."""
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno in NOT_EMPTY or isinstance(error, FileNotFoundError):
            return False
        raise
    return True


def flush_tree(folder: Path) -> None:
    """Have a folder on disk, with everything in it."""
    for name in names(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            flush_tree(path)
        elif path.is_file():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    flush(str(folder))


def check_free(out: Path, *, force: bool) -> None:
    """Prove that an output may be put there: nothing stands there, an empty folder, or, with force, one of ours.

    Raises:
        OutputError: It may not.
    """
    if os.path.ismount(out):
        raise OutputError(f"{out} is where a disk is mounted: it cannot be replaced", hint=f"give --out {out}/average")
    if _is_vacant(out) or (force and is_ours(out)):
        return
    if force:
        raise OutputError(
            f"{out} holds something else than rebuilt averages; only those are replaced",
            hint="give --out another folder, or move away what is there",
        )
    raise OutputError(
        f"{out} exists and is not an empty folder; nothing is ever overwritten unless --force is given",
        hint="give --out another folder, or --force to replace rebuilt averages",
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds rebuilt averages and nothing else."""
    if not folder.is_dir():
        return False
    found = names(folder)
    return bool(found) and all(_is_average(folder / name) for name in found)


def put(files: Path, out: Path, *, force: bool) -> None:
    """Give a folder the name of the output. An old one is moved aside just before, and removed just after.

    Raises:
        OutputError: Something stands there that may not be replaced; the folder keeps its name then.
        FileNotFoundError: The folder is gone.
    """
    while True:
        check_free(out, force=force)
        replaced = None if _is_vacant(out) else _aside(out, "replaced")
        if replaced and not renamed(out, replaced):
            continue
        try:
            # Something else may have taken the place since the last look, before it was moved or after.
            if not replaced or is_ours(replaced):
                os.rename(files, out)
                break
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
        finally:
            if replaced and not out.exists():
                renamed(replaced, out)
    flush(str(files.parent))
    flush(str(out.parent))
    if replaced:
        with suppress(OSError):  # the next start tries again
            clear(replaced, out)


def mend(out: Path) -> None:
    """Undo or end what a process that was killed in ``put`` or ``clear`` left."""
    for name in names(out.parent):
        path = out.parent / name
        if _was_aside(name, out, "removed"):
            shutil.rmtree(path, ignore_errors=True)
        elif _was_aside(name, out, "replaced"):
            # The order matters: what stands aside now and has a successor at this later moment is the old one.
            if _is_vacant(out):
                renamed(path, out)
            elif is_ours(out):
                clear(path, out)


def clear(folder: Path, out: Path) -> None:
    """Remove a folder that nobody may see half removed, and that may be gone."""
    grave = _aside(out, "removed")
    if renamed(folder, grave):
        flush(str(out.parent))
        shutil.rmtree(grave, ignore_errors=True)


def _is_vacant(out: Path) -> bool:
    return not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not names(out))


def _is_average(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    try:
        recipe = json.loads((folder / "phema.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(recipe, dict) and recipe.get("format") == FORMAT


def _aside(out: Path, why: str) -> Path:
    return out.parent / temporary_name(f"{out.name}.{why}")


def _was_aside(name: str, out: Path, why: str) -> bool:
    prefix = f".{out.name}.{why}."
    # One more dot, or it belongs to an output whose name begins like this one's.
    return name.startswith(prefix) and name[len(prefix) :].count(".") == 1 and writer_of(name) is not None
