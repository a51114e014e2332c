import pytest
import torchvision
from torch import nn

from lightning_norm import BNET, NormSwap, swap
from lightning_norm.surgery.residual_blocks import last_norms
from tests.callbacks.toy import Net, loader, trainer

BLOCKS = {
    "resnet18": ("bn2", 8),
    "resnet34": ("bn2", 16),
    "resnet50": ("bn3", 16),
    "resnext50_32x4d": ("bn3", 16),
    "wide_resnet50_2": ("bn3", 16),
}


def network(arch):
    return torchvision.models.get_model(arch, weights=None, num_classes=2)


@pytest.mark.parametrize("arch", BLOCKS)
def test_the_last_norm_of_each_block(arch):
    last, blocks = BLOCKS[arch]
    model = network(arch)
    assert len(last_norms(model)) == blocks
    report = swap(model, "bnet", include="last_of_block")
    assert [row.name for row in report.layers] == last_norms(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, BNET)):
            block = name.startswith("layer") and "downsample" not in name
            assert isinstance(module, BNET) == (block and name.endswith(last)), name


@pytest.mark.parametrize("where", ["include", "exclude", "rules", "list"])
def test_wherever_a_pattern_goes(where):
    arguments = {
        "include": {"norm": "bnet", "include": "last_of_block"},
        "exclude": {"norm": "bnet", "exclude": "last_of_block"},
        "rules": {"norm": "sn", "rules": {"last_of_block": "bnet"}},
        "list": {"norm": "bnet", "include": ["last_of_block", "bn1"]},
    }[where]
    report = swap(network("resnet18"), **arguments)
    rows = {row.name for row in report.layers if row.target == "BNET"}
    ends = {name for name in rows if name.endswith("bn2")}
    assert {"include": (8, 8), "exclude": (12, 0), "rules": (8, 8), "list": (17, 8)}[where] == (len(rows), len(ends))


class Residual(Net):
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet.BasicBlock(3, 3)


def test_in_a_trainer():
    model = Residual()
    trainer(NormSwap("bnet", include="last_of_block")).fit(model, loader())
    assert isinstance(model.net.bn2, BNET)
    assert type(model.net.bn1) is nn.BatchNorm2d


def test_a_model_without_blocks_is_told():
    with pytest.raises(
        ValueError, match="include='last_of_block' matched none of the 1 layer: none is the bn2 of a Basic"
    ):
        swap(nn.Sequential(nn.BatchNorm2d(3)), "bnet", include="last_of_block")
