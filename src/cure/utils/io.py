"""Files that are written completely or not at all, and JSON that is read with a clear error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

from cure.errors import CheckpointError, ConfigError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, then rename it.

    A reader of ``path`` sees the old content or the new, also after a crash; the temporary file is
    removed when anything fails.

    Args:
        path: the file to write or replace; its folder exists.
        write: writes everything to the path that it is given.

    Raises:
        CheckpointError: when the disk is full or refuses; what ``path`` held is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        refused = isinstance(error, RuntimeError) and re.search(
            "PytorchStreamWriter|inline_container", str(error)
        )
        if not refused and not isinstance(error, OSError):
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space is left on the disk" if full else first_line(error)
        raise CheckpointError(
            f"could not write {path}: {reason}; nothing that existed was lost"
        ) from error
    # The rename itself must reach the disk too; not every system can flush a folder.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: object, compact: bool = False) -> None:
    """Write a JSON file completely or not at all.

    Args:
        path: the file to write or replace; its folder exists.
        content: dicts, lists, strings, numbers, booleans and None.
        compact: write one line without spaces instead of an indented text.

    Raises:
        CheckpointError: when it cannot be written.
    """
    if compact:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    else:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: when the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({first_line(error)}); restore it from a copy"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without the path, at most 200 characters."""
    said = (isinstance(error, OSError) and error.strerror) or str(error)
    text = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return (text or type(error).__name__)[:200].rstrip(".")


@overload
def user_path(path: str | Path) -> Path: ...
@overload
def user_path(path: None) -> None: ...
def user_path(path: str | Path | None) -> Path | None:
    """A path that a user gave; ``~`` is the home directory.

    Raises:
        ConfigError: for what is no path.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ConfigError(f"expected a path, got {path!r}")
    return None if path is None else Path(path).expanduser()


def is_there(path: Path) -> bool:
    """Whether something exists at a path that is to be written.

    Raises:
        ConfigError: when the system does not say, as for a name that is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({first_line(error)}); name another place"
        ) from None


def check_free(output: str | Path | None) -> Path | None:
    """Refuse an output file that exists or cannot be made, before anything is computed for it.

    Args:
        output: the file; None is accepted.

    Returns:
        Its path (:func:`user_path`).

    Raises:
        ConfigError: when it exists or its folder does not.
    """
    output = user_path(output)
    if output is None:
        return None
    if is_there(output):
        raise ConfigError(f"{output} exists and is kept; name another output file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {output} does not exist; make it, or name another file")
    return output
