"""What is not installed is told in one line, with what to type, before anything runs."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lightning_norm.cli.main import main
from lightning_norm.demo.data import Digits

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ROOT = Path(__file__).parent.parent
SN = str(ROOT / "examples/configs/digits_sn.yaml")
QUICK = ["--trainer.fast_dev_run", "1", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]


def without(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say "not there"


@pytest.mark.parametrize(
    ("absent", "command", "what", "extra"),
    [
        (["sklearn"], ["fit", "--config", SN], "sklearn, for scikit-learn's Digits", "examples"),
        (["sklearn"], ["compare"], "sklearn, for scikit-learn's Digits", "examples"),
        (["scipy"], ["compare"], "scipy, for pictures and intervals", "examples"),
        (["scipy", "matplotlib"], ["compare"], "matplotlib and scipy, for pictures", "examples"),
        (["matplotlib"], ["bench", "--save", "."], "matplotlib, for the picture of --save", "examples"),
        (["onnx"], ["export", "--out", "net.onnx"], "for a .onnx file", "export"),
        (["onnxscript"], ["export", "--out", "net.onnx"], "for a .onnx file", "export"),
    ],
    ids=lambda value: "+".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_missing_extra_is_named_before_anything_runs(tmp_path, monkeypatch, capfd, absent, command, what, extra):
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, *absent)
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capfd.readouterr()
    assert ended.value.code == 2
    # More may be absent than was taken away.
    assert all(name in said.err.partition("not installed: ")[2] for name in absent)
    assert what in said.err
    assert f"pip install 'lightning-norm[{extra}]'" in said.err
    assert not said.out
    assert "NormSwap" not in said.err
    assert not list(tmp_path.iterdir())


def test_the_data_say_it_to_python_too(monkeypatch):
    without(monkeypatch, "sklearn")
    with pytest.raises(ModuleNotFoundError, match=r"lightning-norm\[examples\]"):
        Digits().setup("fit")


@pytest.fixture
def environment(tmp_path):
    """Return a function that runs Python where some distributions are not installed."""
    site = Path(sysconfig.get_path("purelib"))
    links, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()

    def run(absent, *arguments):
        links.mkdir()
        for entry in site.iterdir():
            name = entry.name.lower()
            if entry.suffix != ".pth" and not any(name.split("-")[0] in (a, f"{a}.py") for a in absent):
                (links / entry.name).symlink_to(entry)
        # -S leaves out the folder that the links stand for.
        path = os.pathsep.join(map(str, (ROOT, links)))
        return subprocess.run(
            [sys.executable, "-S", *arguments], capture_output=True, text=True, cwd=work,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


OPTIONAL = ["matplotlib", "timm", "onnx", "onnxscript", "safetensors", "scipy", "shtab"]


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["jsonargparse", "torchvision", "torchmetrics", "tensorboard"])
def test_what_every_command_needs_is_named(environment, absent):
    done = environment([absent], "-m", "lightning_norm", "fit", "--config", SN)
    assert done.returncode == 2, done.stderr
    assert f"lightning-norm: error: {absent} is not installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_training_does_without_what_only_draws_or_reads_other_files(environment):
    # scikit-learn, which holds the digits, needs scipy.
    absent = [name for name in OPTIONAL if name != "scipy"]
    done = environment(absent, "-m", "lightning_norm", "fit", "--config", SN, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 BatchNorm2d layers -> SwitchableNorm" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_library_is_imported_without_any_extra(environment):
    names = ["callbacks", "plugins", "surgery.swap", "testing", "metrics"]
    code = "import " + ", ".join(f"lightning_norm.{name}" for name in names)
    done = environment([*OPTIONAL, "sklearn", "jsonargparse", "torchvision", "triton", "pytest"], "-c", code)
    assert done.returncode == 0, done.stderr
