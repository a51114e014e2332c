"""Every YAML block of the README and the docs is a configuration: its classes and arguments exist, and it swaps."""

import warnings

import pytest
import torch
import yaml
from torch import nn

import lightning_norm
from lightning_norm import NormSwap
from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.cli.norm_cli import NormCLI
from lightning_norm.cli.section import SECTION, norm_swap_of
from tests.test_readme import PAGES, ROOT, blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_norm.LeftAloneWarning", "ignore::lightning_norm.ParameterGrowthWarning"
)
BLOCKS = [
    pytest.param(yaml.safe_load(block), id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, block in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml"))
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)


class Job(pl.LightningModule):
    """Layers of the kinds that examples name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.others = nn.Sequential(nn.GroupNorm(2, 16), nn.LayerNorm(16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the file that an example reads."""
    folder = tmp_path_factory.mktemp("yaml")
    model = Job()
    lightning_norm.swap(model, "sn", source="BatchNorm")
    torch.save({"state_dict": model.state_dict()}, folder / "sn50.ckpt")
    return folder


@pytest.fixture(scope="module")
def parser(folder):
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": f"{__name__}.Job"}), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NormCLI(["--config", str(folder / "run.yaml")], run=False, save_config_callback=None).parser


@pytest.mark.parametrize("block", BLOCKS)
def test_its_classes_and_arguments_exist_and_it_swaps(block, parser, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if "layers" in block:  # a plan, whose layers are the reader's
        (folder / "plan.yaml").write_text(yaml.safe_dump(block))
        assert len(NormSwap(plan="plan.yaml").options.rules) == len(block["layers"])
        return
    # The names of models and the machines in an example are the reader's.
    config = {key: block[key] for key in ("norm", "optimizer", "lr_scheduler") if key in block}
    trainer = {k: v for k, v in block.get("trainer", {}).items() if k not in {"strategy", "devices"}}
    config = parser.parse_object({**config, "trainer": trainer, "model": f"{__name__}.Job"})
    built = parser.instantiate_classes(config)
    swaps = [c for c in built.trainer.callbacks or () if isinstance(c, NormSwap)]
    swaps += [swap for swap in [norm_swap_of(config.get(SECTION))] if swap is not None]
    assert swaps or "NormScheduler" in str(block)
    for callback in swaps:
        arguments = callback.swap_arguments()
        # So are the names of layers; the rules of an example end with one for all others.
        arguments |= {"exclude": None, "include": None}
        assert len(lightning_norm.swap(Job(), **arguments))
