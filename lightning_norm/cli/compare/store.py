"""The folder of a comparison: one file per finished run, written whole or not at all, shared by any processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_norm.surgery.whole_files import write_whole

FORMAT = 1
"""Of the files; a reader of another format says so instead of guessing."""

ENTRIES: Mapping[str, type] = {
    **{"name": str, "label": str, "seed": int, "steps": int},
    **dict.fromkeys(("swap", "set", "sweep", "settings", "history", "test"), dict),
}
"""What a run has, with its type: the entries without which neither its settings nor its results can be told."""

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
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the run is trained again.") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no run of this version of compare: expected format {FORMAT}. Choose another --out."
            )
        if lost := [entry for entry, kind in ENTRIES.items() if not isinstance(record.get(entry), kind)]:
            raise ValueError(f"{path} is damaged (no {lost[0]!r}): delete it, and the run is trained again.")
        # A copy under another name would stand for a second run, or for the run of another seed.
        if record["name"] != name:
            raise ValueError(f"{path} is a copy of {record['name']}.json: delete it, or give it its name.")
        return record

    def read_all(self) -> list[Record]:
        """Return every finished run in the folder, by name.

        Raises:
            ValueError: a file is damaged, or there is none.
        """
        records = [self.read(path.stem) for path in sorted(self.runs.glob("*.json"))]
        if not records:
            raise ValueError(f"{self.folder} holds no finished run: expected files in {self.runs}.")
        return [record for record in records if record is not None]

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
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / "report.lock")

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a run's lock; yield whether this process has it, and ``False`` while another one does."""
        self.locks.mkdir(parents=True, exist_ok=True)
        # Not to wait: whoever is refused goes on with another run.
        lock = FileLock(self.locks / f"{name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
