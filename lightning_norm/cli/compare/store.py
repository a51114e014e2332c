"""The folder of a comparison: one file per finished run, written whole or not at all, shared by any processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_norm.errors import WriteError
from lightning_norm.surgery.whole_files import write_whole

FORMAT = 1
"""Of the files; a reader of another format says so instead of guessing."""

ENTRIES: Mapping[str, type] = {
    **{"name": str, "label": str, "seed": int, "steps": int},
    **dict.fromkeys(("swap", "set", "sweep", "settings", "history", "test"), dict),
}
"""What a run has, with its type: the entries without which neither its settings nor its results can be told."""

NUMBERS = ("step_ms", "peak_mb", "parameters", "seconds")
"""Entries that are a number, or ``None`` where it could not be measured."""

Record = dict[str, Any]


class RunStore:
    """Finished runs in ``FOLDER/runs``, and a lock per run in ``FOLDER/locks`` while a process trains it.

    The lock is the operating system's: it ends with its process, however that ends.

    Args:
        folder: of the comparison; made when the first run is claimed or written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = RunStore(Path(folder))
    ...     with store.claim("sn-seed0") as mine:
    ...         store.write("sn-seed0", {"name": "sn-seed0", "label": "sn"})
    ...     mine, [file.name for file in store.runs.iterdir()], store.read("bn-seed0")
    (True, ['sn-seed0.json'], None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.locks = folder, folder / "runs", folder / "locks"

    def read(self, name: str) -> Record | None:
        """Return a finished run, ``None`` if there is none.

        Raises:
            ValueError: the file is damaged, or of another format.
        """
        path = self.runs / f"{name}.json"
        # Tried and not asked for: another process may delete or write it in between.
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise ValueError(f"{self.folder} is no folder. Type --out FOLDER, one that is there or not yet.") from error
        except PermissionError as error:  # which says nothing of what is in it
            raise ValueError(_may_not_read(path)) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the run is trained again.") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no run of this version of compare: expected format {FORMAT}. Choose another --out."
            )
        if lost := [entry for entry, kind in ENTRIES.items() if not isinstance(record.get(entry), kind)]:
            raise ValueError(f"{path} is damaged (no {lost[0]!r}): delete it, and the run is trained again.")
        if mistake := _mistake(record):
            raise ValueError(f"{path} is damaged ({mistake}): delete it, and the run is trained again.")
        # A copy under another name would stand for a second run, or for the run of another seed.
        if record["name"] != name:
            raise ValueError(f"{path} is a copy of {record['name']}.json: delete it, or give it its name.")
        return record

    def names(self) -> list[str]:
        """Return the names of the finished runs, in their order.

        Raises:
            ValueError: the folder is there and may not be read.
        """
        try:
            # Not by a pattern, which takes what may not be read for empty.
            return sorted(path.stem for path in self.runs.iterdir() if path.suffix == ".json")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            raise ValueError(_may_not_read(self.runs)) from error

    def read_all(self) -> list[Record]:
        """Return every finished run in the folder, by name.

        Raises:
            ValueError: a file is damaged, two are of the same run, or there is none.
        """
        found = map(self.read, self.names())
        records = [record for record in found if record is not None]
        if not records:
            raise ValueError(f"{self.folder} holds no finished run: expected files in {self.runs}.")
        # Each would count as a run of its own, and make the intervals narrower than they are.
        names: dict[tuple[Any, ...], str] = {}
        for record in records:
            run = (record["label"], record["seed"], *record["sweep"].items())
            if run in names:
                raise ValueError(
                    f"{self.runs} holds two runs of {record['label']!r} with seed {record['seed']}, {names[run]}.json "
                    f"and {record['name']}.json: delete one of them."
                )
            names[run] = record["name"]
        return records

    def read_report(self) -> Record | None:
        """Return what the last report was of, as ``results.json`` says it; ``None`` where there is none."""
        try:
            report = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return report if isinstance(report, dict) and report.keys() >= {"metric", "higher_is_better"} else None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a finished run under a temporary name and rename it, so that no reader meets half a file."""
        write_whole(self.runs / f"{name}.json", json.dumps({"format": FORMAT, **record}, indent=1))

    def writes_report(self) -> FileLock:
        """Return the lock under which a process writes the report: one that ends at the same time waits for it."""
        return self._lock("report")

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a run's lock; yield whether this process has it, and ``False`` while another one does."""
        # Not to wait: whoever is refused goes on with another run.
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        """Return a lock, in a folder that is there and can be written into.

        Raises:
            WriteError: it cannot.
        """
        path = self.locks / f"{name}.lock"
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise WriteError(
                f"cannot write into {str(self.locks)!r}: {error.strerror or error}. Type --out FOLDER, one that can be "
                "written into."
            ) from error
        return FileLock(path)


def _may_not_read(path: Path) -> str:
    return f"cannot read {path}: Permission denied. Type chmod -R u+rX {path}, or ask whoever owns it."


def _mistake(record: Record) -> str:
    """Return what is wrong inside of the entries of a run; "" for nothing."""
    texts = [(entry, value) for entry in ("sweep", "settings") for value in record[entry].values()]
    numbers = [("test", value) for value in record["test"].values()]
    numbers += [(entry, record[entry]) for entry in NUMBERS if record.get(entry) is not None]
    lists = record["history"].values()
    wrong = [
        *(f"{entry} must be text, got {value!r:.80}" for entry, value in texts if not isinstance(value, str)),
        *(f"{entry} must be a number, got {value!r:.80}" for entry, value in numbers if not _is_number(value)),
        *(
            f"history must be lists of numbers, got {value!r:.80}"
            for value in lists
            if not (value and isinstance(value, list) and all(map(_is_number, value)))
        ),
    ]
    return wrong[0] if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
