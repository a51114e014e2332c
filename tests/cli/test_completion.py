"""What TAB completes, in a real bash."""

import shlex
import shutil
import subprocess

import pytest

from lightning_norm import normalizers
from lightning_norm.cli.completion import script
from lightning_norm.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    file = tmp_path_factory.mktemp("completion") / "script"
    file.write_text(script())

    def completions(*words):
        typed = " ".join(map(shlex.quote, ("lightning-norm", *words)))
        code = (
            f'source {file}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _lightning_norm; echo "${{COMPREPLY[@]}}"'
        )
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    return completions


def test_the_commands(complete):
    assert complete("") == list(COMMANDS)
    assert complete("com") == ["completion", "compare"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--nor"], "--norm"),
        (["fit", "--trainer.max_ep"], "--trainer.max_epochs"),
        (["fit", "--norm.exc"], "--norm.exclude"),
        (["test", "--ckpt"], "--ckpt_path"),
        (["plan", "--sa"], "--save"),
        (["plan", "--norm.excl"], "--norm.exclude"),
        (["export", "--sha"], "--shape"),
        (["compare", "--se"], "--seeds"),
        (["compare", "--trainer.max_t"], "--trainer.max_time"),
        (["bench", "--rep"], "--repeats"),
        (["convert", "--ren"], "--rename"),
        (["list", "--js"], "--json"),
        (["fit", "--norm", "s"], "sn"),
        (["bench", "--device", "c"], "cuda"),
        (["fit", "--data", "Dig"], "Digits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_and_its_value(complete, words, expected):
    assert expected in complete(*words)


def test_all_norms(complete):
    assert set(complete("fit", "--norm", "")) >= {
        k for k, c in normalizers().items() if "lightning_norm" in c.__module__
    }


def test_each_shell(capsys):
    main(["completion", "zsh"])
    shown = capsys.readouterr().out
    assert shown.startswith("autoload")
    assert shown.endswith(script())
