import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lightning_norm.cli.export import run
from lightning_norm.cli.main import main
from lightning_norm.errors import CheckpointError

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CUSTOM = """
import torch
from tests.callbacks.toy import Net

class Exported(Net):
    example_input_array = torch.zeros(2, 3, 8, 8)
"""
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(n) for n in ("onnx", "onnxscript")), reason="needs lightning-norm[export]"
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A module on the path, trained with bcn, and its checkpoint."""
    import sys

    from lightning_norm import NormSwap
    from tests.callbacks.toy import loader, trainer

    (tmp_path / "exported_job.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("exported_job", None)
    from exported_job import Exported

    model = Exported()
    runner = trainer(NormSwap("bcn"), max_epochs=2)
    model.net[1].bias.requires_grad_(False)  # iota stays with it only where nothing is trained
    runner.fit(model, loader())
    with torch.no_grad():
        model.net[1].iota.fill_(1)
    runner.save_checkpoint("net.ckpt")
    return model.eval()


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layers", "target"), [("fold", "Identity"), ("plain", "BatchNorm2d"), ("keep", None)])
def test_a_checkpoint_becomes_a_program(layers, target, trained, capsys):
    main(
        ["export", "--model", "exported_job.Exported", "--ckpt_path", "net.ckpt", "--layers", layers, "--out", "n.pt2"]
    )
    shown = capsys.readouterr().out
    assert "written to n.pt2; load it with torch.export.load('n.pt2').module()\n" in shown
    assert target is None or target in shown
    program = torch.export.load("n.pt2")
    assert bool([n for n in program.graph.nodes if "batch_norm" in str(n.target)]) == (layers == "plain")
    torch.testing.assert_close(program.module()(X), trained(X), rtol=1e-4, atol=1e-5)  # another batch size


def test_without_a_checkpoint_the_configuration_is_swapped(trained, capsys):
    swap = [
        "--trainer.callbacks+=NormSwap",
        "--trainer.callbacks.norm=gn",
        "--trainer.callbacks.norm_args={num_groups: 2}",
    ]
    run(["--model", "exported_job.Exported", *swap, "--shape", "1x3x8x8", "--out", "n.pt2"])
    assert "GroupNorm" in capsys.readouterr().out
    assert torch.export.load("n.pt2").module()(X).shape == (5,)


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx(trained):
    import onnx
    from onnx.reference import ReferenceEvaluator

    run(["--model", "exported_job.Exported", "--ckpt_path", "net.ckpt", "--out", "n.onnx"])
    graph = onnx.load("n.onnx")
    assert not [n for n in graph.graph.node if "BatchNorm" in n.op_type]
    (y,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), trained(X).detach(), rtol=1e-4, atol=1e-5)


def test_bad_input(trained, monkeypatch, capsys):
    model = ["--model", "exported_job.Exported"]
    with pytest.raises(ValueError, match=r"must end in .pt2 or .onnx, got 'n.txt'"):
        run([*model, "--out", "n.txt"])
    with pytest.raises(ValueError, match="--shape must read like"):
        run([*model, "--out", "n.pt2", "--shape", "1x3xa"])
    with pytest.raises(ValueError, match="input of Net is not known"):
        run(["--model", "tests.callbacks.toy.Net", "--out", "n.pt2"])
    Path("empty.ckpt").touch()
    with pytest.raises(CheckpointError, match="it is empty"):
        run([*model, "--out", "n.pt2", "--ckpt_path", "empty.ckpt"])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-norm\[export\]"):
        run([*model, "--out", "n.onnx"])
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "--layers" in capsys.readouterr().out


def test_what_has_decided_is_hardened_first(trained, capsys):
    main(["export", "--model", "exported_job.Exported", "--ckpt_path", "net.ckpt", "--harden", "0.9", "--out", "n.pt2"])
    shown = capsys.readouterr().out
    assert "1 bn     outputs moved by" in shown
    assert "1 folded" in shown
    program = torch.export.load("n.pt2").module()
    torch.testing.assert_close(program(X), trained(X), rtol=1e-4, atol=1e-5)
