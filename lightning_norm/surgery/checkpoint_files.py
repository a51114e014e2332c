"""Read a checkpoint file, or say what is wrong with it before anything is loaded."""

from __future__ import annotations

import os
import re
import reprlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_norm.errors import CheckpointError

File: TypeAlias = str | os.PathLike[str]

STATE_DICT = ("state_dict",)
"""Under which name Lightning keeps the weights."""

RUNS_CODE = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|pty|socket|runpy|importlib|ctypes|webbrowser|pdb|timeit|commands)\."
    r"|((builtins|__builtin__)\.)?(eval|exec|compile|__import__|open|input|breakpoint)$"
)
"""Functions that only a malicious pickle calls; torch loads none of them with ``weights_only=True``."""

HEADER: dict[str, tuple[type, ...]] = {
    "epoch": (int,),
    "global_step": (int,),
    "pytorch-lightning_version": (str,),
    "loops": (Mapping,),
    "callbacks": (Mapping,),
    "optimizer_states": (list,),
    "lr_schedulers": (list,),
    "hyper_parameters": (Mapping,),
}
"""Entries that Lightning writes beside the weights, and what they must be."""


def read_checkpoint(
    path: File, map_location: Any = "cpu", weights_only: bool | None = None, entries: Sequence[str] = STATE_DICT
) -> dict[str, Any]:
    """Read a file; a ``state_dict`` by itself becomes ``{"state_dict": ...}``.

    Args:
        path: of what ``torch.save`` or Lightning wrote.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``; ``True`` by default, so that no code in the file is run.
        entries: names under which the weights may be.

    Returns:
        The checkpoint, with "state_dict" and whatever else was saved.

    Raises:
        CheckpointError: it cannot be read, or holds no weights.
        FileNotFoundError: it does not exist.
    """
    # First without the tensors: what is wrong is told before gigabytes are read.
    check_file(path, weights_only, entries)
    try:
        return _checked(path, torch.load(path, map_location=map_location, weights_only=_safe(weights_only)), entries)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise unreadable(path, error) from error


def check_file(path: Any, weights_only: bool | None = None, entries: Sequence[str] = STATE_DICT) -> dict[str, Any]:
    """Check the archive, its checksums and what it holds, without its tensors; a remote path or a folder is let pass.

    Args:
        path: of a checkpoint.
        weights_only: as for :func:`read_checkpoint`.
        entries: likewise.

    Returns:
        The checkpoint with its tensors on the meta device; empty for a remote path, a folder or an old format.

    Raises:
        CheckpointError: what is wrong.
        FileNotFoundError: the file does not exist.
    """
    if not isinstance(path, (str, os.PathLike)) or "://" in str(path) or Path(path).is_dir():
        return {}
    # From here on it is a file on this machine, which can be looked at before torch reads it.
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}: the file does not exist.")
    if file.stat().st_size == 0:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: it is empty (0 bytes).")
    # torch.save writes a zip archive, whose index is at the end: a file that breaks off has none.
    try:
        is_archive = zipfile.is_zipfile(file)
    except zipfile.BadZipFile as error:  # an archive of several parts, by a damaged byte
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: damaged archive ({error}).") from error
    if not is_archive:
        with file.open("rb") as opened:
            first_bytes = opened.read(4)
        if first_bytes == b"PK\x03\x04":
            raise CheckpointError(
                f"cannot read the checkpoint {str(path)!r}: it begins as one and breaks off after "
                f"{file.stat().st_size} bytes. The write or the download was interrupted."
            )
        # This is torch's format before 1.6, or no checkpoint at all: reading it tells.
        return {}
    # Damaged weights would otherwise load, or fail with a message that names neither the file nor the damage.
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            bad = archive.testzip() if torch.serialization.get_crc32_options() else None
    except Exception as error:  # damaged names and lengths in the index raise anything as well
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: damaged archive ({error}).") from error
    if bad is not None:
        raise CheckpointError(
            f"cannot read the checkpoint {str(path)!r}: the checksum of {bad!r} in it does not match, so the file is "
            "damaged. If it was written with torch.serialization.set_crc32_options(False), set that here as well."
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint: a zip archive that torch.save did not write (first entry: {names[:1]})."
        )
    # On the meta device nothing but the structure is read, whatever the size of the file.
    try:
        content = torch.load(file, map_location="meta", mmap=True, weights_only=_safe(weights_only))
        return _checked(path, content, entries)
    except Exception as error:
        raise unreadable(path, error) from error


def is_url(path: Any) -> bool:
    """Tell whether Lightning reads the path from the web.

    >>> is_url("https://example.org/last.ckpt"), is_url("last.ckpt")
    (True, False)
    """
    return str(path).startswith(("http://", "https://"))


def unreadable(path: Any, error: BaseException) -> BaseException:
    """Return what to raise in place of torch's error: a path and a reason.

    Args:
        path: of the file.
        error: what torch raised; one of this package's own is returned as it is.
    """
    if isinstance(error, CheckpointError):
        return error
    # torch says which class it refused in the middle of a long message; it is all that the user needs.
    unsafe = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.<>]+)", str(error))
    if unsafe and RUNS_CODE.match(unsafe[1]):
        return CheckpointError(
            f"{str(path)!r} would run code when it is loaded: it calls {unsafe[1]}, which no checkpoint needs. Nothing "
            "of it was run. Do not load this file, and tell whoever gave it to you."
        )
    if unsafe:
        return CheckpointError(
            f"cannot read the checkpoint {str(path)!r}: it holds objects of {unsafe[1]}, which "
            "torch does not load from files by default. If you trust the file, pass weights_only=False."
        )
    first = str(error).strip().splitlines()[:1]
    return CheckpointError(
        f"cannot read the checkpoint {str(path)!r}: it is damaged or no file that torch.save wrote "
        f"({type(error).__name__}: {first[0] if first else 'end of file'})."
    )


def _safe(weights_only: bool | None) -> bool:
    return True if weights_only is None else weights_only


def _check_header(path: Any, content: Mapping[str, Any]) -> None:
    """Refuse entries beside the weights that are not what Lightning writes.

    Raises:
        CheckpointError: the entry, what it must be and what it is.
    """
    for name, kinds in HEADER.items():
        value = content.get(name)
        # Lightning compares versions before it migrates a checkpoint, and raises far from here for what is none.
        version = name.endswith("version") and isinstance(value, str) and not re.match(r"\d+(\.\d+)+", value)
        if name in content and (version or isinstance(value, bool) or not isinstance(value, kinds)):
            expected = "a version" if name.endswith("version") else f"a {kinds[0].__name__.lower()}"
            raise CheckpointError(
                f"cannot read the checkpoint {str(path)!r}: its entry {name!r} must be {expected}, got "
                f"{reprlib.repr(value)}."
            )
    for name in content["state_dict"]:
        if not isinstance(name, str):
            raise CheckpointError(
                f"cannot read the checkpoint {str(path)!r}: a name in its state_dict is {reprlib.repr(name)}, no text."
            )


def _checked(path: Any, content: Any, entries: Sequence[str]) -> dict[str, Any]:
    """Return the content as a checkpoint with a ``state_dict``.

    Raises:
        CheckpointError: it is none.
    """
    for entry in entries if isinstance(content, Mapping) else ():
        if isinstance(content.get(entry), Mapping):
            checked: dict[str, Any] = {**content, "state_dict": content[entry]}
            _check_header(path, checked)
            return checked
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return {"state_dict": content}
    what = (
        f"a dict with the entries {list(content)[:5]}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(
        f"{str(path)!r} is no checkpoint: it holds {what}, and a checkpoint has a state_dict.{take_out(path, content)}"
    )


def take_out(path: Any, content: Any) -> str:
    """Return the sentence that says how to take the weights out of a file in which they lie deeper; "" for none.

    >>> take_out("a.pth", {"model_ema": {"weight": torch.ones(1)}})
    " Weights are in it: type torch.save(torch.load('a.pth')['model_ema'], 'weights.pth'), and use that file."
    """
    # Level by level, so that the nearest are found; three are more than any training script has.
    level: list[tuple[tuple[str, ...], Any]] = [((), content)] if isinstance(content, Mapping) else []
    for _ in range(3):
        level = [((*keys, k), v) for keys, part in level for k, v in part.items() if isinstance(v, Mapping) and v]
        for keys, part in level:
            if all(isinstance(value, Tensor) for value in part.values()):
                entries = "".join(f"[{key!r}]" for key in keys)
                typed = f"torch.save(torch.load({str(path)!r}){entries}, 'weights.pth')"
                return f" Weights are in it: type {typed}, and use that file."
    return ""
