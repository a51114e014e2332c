"""Every file that a command writes is the earlier one or the new one, on a full disk as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_norm.errors import WriteError
from lightning_norm.surgery.whole_files import write_whole, writing_whole

ROOT = Path(__file__).parents[2]


def test_a_full_disk_leaves_every_earlier_file_as_it_was(tmp_path):
    """The kernel refuses to make any file longer than 40 bytes, which is what a full disk does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path.parent)}
    try:
        import onnxscript  # noqa: F401

        environment["ONNX"] = "1"
    except ImportError:
        pass
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cli" / "full_disk.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT" in run.stdout, run.stderr
    said, left = json.loads(run.stdout.partition("RESULT")[2])
    assert said == dict.fromkeys(said, "WriteError old")
    assert left == []


def interrupted(path):
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_reader_meets_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    write_whole(path, "old")
    with writing_whole(path) as there:
        there.write_text("new")
        (there.parent / "beside.data").write_text("weights")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert (path.parent / "beside.data").read_text() == "weights"
    with pytest.raises(KeyboardInterrupt), writing_whole(path) as there:
        interrupted(there)
    assert path.read_text() == "new"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.txt", "beside.data"]


def test_mode_link_and_device_stay_what_they_are(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    write_whole(path, "old")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert (link.is_symlink(), path.read_text(), path.stat().st_mode & 0o777) == (True, "new", 0o640)
    write_whole("/dev/null", "anything")
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written_is_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write '.*/file/a.txt': .*as it was"):
        write_whole(tmp_path / "file" / "a.txt", "text")
