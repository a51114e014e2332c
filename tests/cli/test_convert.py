"""lightning-norm convert: a file of a paper's authors becomes one that trains on, is tested and exported."""

import pytest
import torch
from torch import nn

from lightning_norm import NormSwap, load_from_checkpoint
from lightning_norm.cli.main import main
from lightning_norm.errors import PublishedFileWarning
from tests.callbacks.toy import Net, loader, trainer
from tests.published import LAYERS, SN, trained, write_files

KEYS = {
    "sn": "sn",
    "sparse sn": "sn",
    "bnet": "bnet",
    "rbn": "rbn",
    "bcn": "bcn",
    "asr": "asr",
    "afn": "afn",
    "cn": "cn",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def theirs(make=SN):
    """The network of the toy job with a layer of the authors'."""
    net = Net().net
    for i, layer in enumerate(net):
        if isinstance(layer, nn.BatchNorm2d):
            net[i] = make(layer.num_features)
    return trained(net)


def test_the_new_file_is_a_checkpoint_of_a_swapped_network(folder, capsys):
    net = theirs()
    torch.save({"state_dict": net.state_dict(), "epoch": 90}, "published.pth")
    main(["convert", "published.pth", "--norm", "sn", "--out", "sn.ckpt", "--prefix", "net."])
    shown = capsys.readouterr().out
    assert "1 layer of sn, with {'choices'" in shown
    assert "NormSwap(plan='sn.ckpt', warm_start='sn.ckpt')" in shown
    model = load_from_checkpoint(Net, "sn.ckpt").double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.net(x), net(x), rtol=1e-5, atol=1e-5)  # the toy is built in float32
    again = Net()
    trainer(NormSwap(plan="sn.ckpt", warm_start="sn.ckpt"), max_epochs=1).fit(again, loader())
    assert [m.correction for m in again.modules() if getattr(m, "key", "") == "sn"]
    trainer(NormSwap(plan="sn.ckpt")).test(Net(), loader(), ckpt_path="sn.ckpt", verbose=False)
    assert torch.load("sn.ckpt", weights_only=True)["lightning_norm"]["layers"]


def test_every_kind(folder):
    write_files(folder)
    for name in KEYS:
        more = ["--norm_args", "{priors: [0.2, 0.5, 0.3]}"] if name == "cn" else []
        main(["convert", f"{name}.pth", "--norm", KEYS[name], "--out", "ours.ckpt", *more])
        content = torch.load("ours.ckpt", weights_only=True)
        (row,) = content["lightning_norm"]["layers"]
        assert (row["name"], row["source"], row["norm"]["class_path"]) == ("0", "BatchNorm2d", KEYS[name])


def test_what_a_file_is_of(folder, capsys):
    for name, makes in (("rbn", "rbn"), ("sn", "sn"), ("cn", None), ("afn", None)):
        torch.save(trained(nn.Sequential(LAYERS[name](20))).state_dict(), "published.pth")
        command = ["convert", "published.pth", "--out", "ours.ckpt"]
        if makes:
            main(command)
            assert f"1 layer of {makes}" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit):
            main(command)
        said = capsys.readouterr().err
        assert ("priors" if name == "cn" else "asr or afn" if "asr or afn" in said else "afn or asr") in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--norm", "snn"], "Did you mean"),
        (["--norm", "rbn"], "type norm='sn'"),
        (["--norm", "sn", "--norm_args", "[1]"], "must be a mapping"),
        (["--norm", "sn", "--rename", "x"], "PATTERN=REPLACEMENT"),
        (["--norm", "sn", "--rename", "(=x"], "no regular expression"),
        (["--norm", "sn", "--norm_args", "{momentun: 1}"], "momentun"),
    ],
)
def test_mistakes_are_one_line(arguments, said, folder, capsys):
    torch.save(trained(nn.Sequential(SN(6))).state_dict(), "published.pth")
    with pytest.raises(SystemExit) as stop:
        main(["convert", "published.pth", "--out", "ours.ckpt", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (folder / "ours.ckpt").exists()
    with pytest.raises(SystemExit):
        main(["convert", "nothing.pth", "--norm", "sn", "--out", "ours.ckpt"])


def test_other_arguments_are_told(folder):
    torch.save(trained(nn.Sequential(SN(6))).state_dict(), "published.pth")
    with pytest.warns(PublishedFileWarning, match="correction"):
        main(["convert", "published.pth", "--norm", "sn", "--norm_args", "{correction: 0}", "--out", "ours.ckpt"])
