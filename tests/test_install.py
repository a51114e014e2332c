"""What pip installs and what is published, in environments and folders of their own."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKED = [
    *("CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"),
    "lightning_norm",
]


def folder_of(package):
    spec = importlib.util.find_spec(package)
    return [str(Path(spec.origin).parent.parent)] if spec else []


DEPENDENCIES = [sysconfig.get_path("purelib"), *folder_of("hatchling"), *folder_of("build")]


def quiet_environment(**more):
    """The process's environment without anything that leads to this clone."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | more


def ran(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def python(tmp_path):
    """A fresh environment with the dependencies of this one, and not the clone that this one may have installed."""
    folder = tmp_path / "environment"
    venv.create(folder, system_site_packages=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A .pth file that leads to a folder does not read the .pth files in it, an editable install of this clone say.
    (site / "dependencies.pth").write_text("\n".join(DEPENDENCIES) + "\n")
    return str(folder / "bin" / "python")


@pytest.fixture
def clone(tmp_path):
    """The tracked files that a build reads, in a folder of the name that a clone has."""
    folder = tmp_path / "above" / "lightning_norm"
    folder.mkdir(parents=True)
    for name in ("lightning_norm", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def build_here():
    """Options with which pip builds by what is installed, where it is: nothing is fetched."""
    return ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []


def test_an_editable_install_counts_in_the_folder_above_the_clone(python, clone):
    ran([python, "-m", "pip", "install", "-q", "--no-deps", *build_here(), "-e", str(clone)], env=quiet_environment())
    code = "import lightning_norm; print(lightning_norm.NormSwap, lightning_norm.__file__)"
    for folder in (clone.parent, clone, clone.parent.parent):
        shown = ran([python, "-c", code], cwd=folder, env=quiet_environment())
        assert "callbacks.swap.norm_swap.NormSwap" in shown
        assert str(clone) in shown
    assert "lightning-norm 0" in ran(
        [str(Path(python).parent / "lightning-norm"), "--version"], cwd=clone.parent, env=quiet_environment()
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    pytest.importorskip("build")
    isolation = ["--no-isolation"] if build_here() else []
    environment = quiet_environment(PYTHONPATH=os.pathsep.join(DEPENDENCIES))
    ran([sys.executable, "-m", "build", *isolation, "--outdir", str(folder), str(ROOT)], env=environment)
    return folder


def test_a_build_holds_the_package_and_nothing_else(built, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import check_wheel

    (wheel,) = built.glob("*.whl")
    (source,) = built.glob("*.tar.gz")
    assert check_wheel.faults(wheel, "") == []
    with tarfile.open(source) as archive:
        assert {name.split("/")[1] for name in archive.getnames()} == set(PACKED)


@pytest.mark.slow
def test_the_wheel_trains_from_a_folder_that_holds_nothing_else(built, python, tmp_path):
    (wheel,) = built.glob("*.whl")
    ran([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], env=quiet_environment())
    work = tmp_path / "empty"
    work.mkdir()
    script = str(Path(python).parent / "lightning-norm")
    environment = quiet_environment(OMP_NUM_THREADS="1")
    job = ["--model", "ImageClassifier", "--data", "Digits", "--norm", "sn", "--trainer.max_epochs", "1"]
    shown = ran([script, "fit", *job], cwd=work, env=environment)
    assert "20 of 20 BatchNorm2d layers -> SwitchableNorm" in shown
    assert "Test accuracy" in shown
    shown = ran([python, "-c", "import lightning_norm; print(lightning_norm.__file__)"], cwd=work, env=environment)
    assert str(tmp_path / "environment") in shown
