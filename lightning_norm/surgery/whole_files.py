"""Write a file whole or not at all: under another name, flushed to the disk, and then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_norm.errors import WriteError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text (UTF-8) or bytes to a file; a reader meets the earlier file or the new one, and never a part.

    Raises:
        WriteError: it cannot be written, as on a full disk. The earlier file is as it was.
    """
    with writing_whole(path) as there:
        there.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write a file to, and put what was written there in place of ``path`` at the end.

    Files that a library writes beside it, such as the weights of an ONNX file, come along.

    Raises:
        WriteError: it cannot be written, as on a full disk. The earlier file is as it was.
    """
    target = Path(os.path.realpath(path))  # a link is to stay one
    try:
        if target.exists() and not target.is_file():  # /dev/stdout, a pipe: nothing to keep, and nothing to rename
            yield Path(path)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own on the same disk: the file has its right name in it, which some libraries write into it.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder) / target.name
            # The file itself comes last, because it names the ones beside it.
            for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                _flush(written)
                if (target.parent / written.name).is_file():
                    written.chmod((target.parent / written.name).stat().st_mode)
                os.replace(written, target.parent / written.name)
    except OSError as error:
        raise WriteError(
            f"cannot write {str(path)!r}: {error.strerror or error}. What was there before is as it was."
        ) from error


def _flush(file: Path) -> None:
    """Wait until a file is on the disk."""
    # Otherwise a machine that loses power may have the new name and not yet the content.
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
