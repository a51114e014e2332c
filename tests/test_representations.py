"""What a notebook and a debugger show of every public class: what it is, and never an address."""

import inspect
import logging

import pytest
import torch
from torch import nn

import lightning_norm
from lightning_norm import Constant, InversePower, Linear
from lightning_norm.callbacks.described import print_report


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def swapped(norm="sn"):
    model = network()
    return model, lightning_norm.swap(model, norm)


def example():
    return torch.randn(2, 3, 8, 8)


CALLS = {
    "NormSwap": 'NormSwap(norm="sn", exclude="fc.*")',
    "NormScheduler": 'NormScheduler({"alpha": InversePower(power=0.5)}, interval="step")',
    "NormMonitor": "NormMonitor(every_n_steps=5)",
    "NormFreeze": "NormFreeze(at_epoch=3)",
    "NormRecalibrate": "NormRecalibrate(num_batches=5)",
    "NormContext": "NormContext(key=1)",
    "Constant": "Constant(0.1)",
    "Linear": "Linear(0.1, 0.2, epochs=3)",
    "Cosine": "Cosine(0.1, 0.2, epochs=3)",
    "Exponential": "Exponential(0.1, 0.9)",
    "InversePower": "InversePower(power=0.5)",
    "Staircase": "Staircase(0.1, 0.5, every=2)",
    "Steps": "Steps({0: 0.1, 5: 0.2})",
    "Chain": "Chain([Constant(0.1, epochs=2), Linear(0.1, 0.2, epochs=3)])",
    "Warmup": "Warmup(schedule=Constant(0.1), epochs=3)",
    "Choice": 'Choice("bn", 0.9)',
    "Paper": 'Paper("A. Author", 2024, "Title", "arXiv")',
    "Scheduled": "Scheduled(0.0, 1.0)",
}
"""Class -> a call, which its repr gives back."""
MADE = {
    "NormSync": lambda: lightning_norm.NormSync(),
    "FeatureCondensation": lambda: lightning_norm.FeatureCondensation(),
    "Moments": lambda: lightning_norm.Moments(torch.zeros(2, 3), torch.ones(2, 3), 4),
    "Affine": lambda: lightning_norm.Affine(torch.zeros(1, 1), torch.ones(2, 3), None),
    "SwapReport": lambda: swapped()[1],
    "DeployReport": lambda: lightning_norm.fold(swapped("bn")[0], example()),
    "HardenReport": lambda: lightning_norm.harden(swapped()[0], example()),
    "NormStatistics": lambda: lightning_norm.norm_statistics(swapped("bn")[0]),
    "Recalibration": lambda: lightning_norm.recalibrate(swapped("bn")[0], [example()], 1),
}
ABSTRACT = ("Normalizer", "MomentNorm", "Schedule")
CLASSES = {
    name: value
    for name in dir(lightning_norm)
    if inspect.isclass(value := getattr(lightning_norm, name))
    and value.__module__.startswith("lightning_norm")
    and not issubclass(value, BaseException)
}
KEYS = {cls.__name__: key for key, cls in lightning_norm.normalizers().items()}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ABSTRACT])
def test_repr_says_what_it_is(name):
    if name in KEYS:
        value = lightning_norm.create(KEYS[name], 8, **({"num_groups": 2} if KEYS[name] == "gn" else {}))
    elif name in CALLS:
        value = eval(CALLS[name], vars(lightning_norm) | CLASSES)
    else:
        value = MADE[name]()  # a KeyError here: a public class needs an example above
    text = repr(value)
    assert text.startswith(name)
    assert " object at 0x" not in text
    if name in CALLS:
        again = eval(text, vars(lightning_norm) | CLASSES)
        assert type(again) is type(value)
        assert repr(again) == text


REPORTS = [name for name, cls in CLASSES.items() if name.endswith(("Report", "Statistics")) or name == "Recalibration"]


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_a_table_in_a_notebook(name):
    report = MADE[name]()
    html = report._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == len(report.table()) > 1
    assert html.count("</th>") == len(report.table()[0])
    assert "<script" not in html
    for line in report.summary().splitlines():
        assert line.split()[0].replace(">", "&gt;") in html


def test_names_are_escaped():
    model = nn.ModuleDict({"<b>": nn.BatchNorm2d(4)})
    assert "<b>" not in lightning_norm.swap(model, "bn")._repr_html_()


def test_the_examples_are_of_public_classes():
    assert {*CALLS, *MADE} <= CLASSES.keys()
    assert isinstance(Constant(0.1), lightning_norm.Schedule)
    assert repr(Linear(0.1, 0.2, epochs=3)) != repr(InversePower(power=0.5))


def test_whoever_silences_lightning_hears_no_report(capsys):
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    for level, heard in ((logging.INFO, True), (logging.WARNING, False)):
        log.setLevel(level)
        print_report("a report")
        assert capsys.readouterr() == ("a report\n" if heard else "", "")
    log.setLevel(before)
