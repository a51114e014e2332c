"""The arguments of a swap stand in one dataclass, and ``swap``, ``NormSwap`` and the section ``norm:`` take them."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from torch import nn

import lightning_norm
from lightning_norm import NormSwap, swap
from lightning_norm.surgery.options import SwapOptions, takes_options

# Prints what the three places know of a field, and what a swap and a callback make of a value for it.
PROBE = """
import inspect, json, sys
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from lightning_norm import NormSwap, swap
from lightning_norm.cli.section import add_section
name = sys.argv[1]
parser = LightningArgumentParser()
add_section(parser)
def described(doc):
    return [line.strip() for line in doc.splitlines() if line.strip().startswith(name + ":")]
signature = inspect.signature(swap)
found = {
    "swap": [signature.parameters[name].default, str(signature.parameters[name].annotation)],
    "NormSwap": [inspect.signature(NormSwap).parameters[name].default],
    "section": [parser.get_defaults().norm[name], parser.parse_args([f"--norm.{name}", "5"]).norm[name]],
    "help": [line.strip() for line in parser.format_help().splitlines() if "the colour" in line],
    "doc of swap": described(swap.__doc__),
    "doc of NormSwap": described(NormSwap.__doc__),
    "called": len(swap(nn.Sequential(nn.BatchNorm2d(4)), "sn", **{name: 5})),
    "callback": NormSwap("sn", **{name: 5}).swap_arguments()[name],
}
print(json.dumps(found))
"""


def test_a_new_field_is_an_argument_of_all_three_without_another_edit(tmp_path):
    package = Path(lightning_norm.__file__).parent
    shutil.copytree(package, tmp_path / "lightning_norm", ignore=shutil.ignore_patterns("__pycache__"))
    options = tmp_path / "lightning_norm" / "surgery" / "options.py"
    field, entry = '    sync_group: str | int = "world"\n', "        sync_group: with which ranks"
    text = options.read_text()
    assert (text.count(field), text.count(entry)) == (1, 1)
    text = text.replace(field, f"{field}    colour: int = 3\n").replace(entry, f"        colour: the colour.\n{entry}")
    options.write_text(text)
    (tmp_path / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "probe.py", "colour"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    (told,) = got.pop("help")
    assert "the colour. (type: int, default: 3)" in told
    assert got == {
        "swap": [3, "<class 'int'>"],
        "NormSwap": [3],
        "section": [3, 5],
        "doc of swap": ["colour: the colour."],
        "doc of NormSwap": ["colour: the colour."],
        "called": 1,
        "callback": 5,
    }


@pytest.mark.parametrize("function", [swap, NormSwap])
def test_every_argument_has_a_default_and_a_description(function):
    parameters = list(inspect.signature(function).parameters.values())
    arguments = [p for p in parameters if p.name != "model"]
    assert [p.name for p in arguments][: len(fields(SwapOptions))] == [f.name for f in fields(SwapOptions)]
    for parameter in arguments:
        assert parameter.default is not parameter.empty
        assert not isinstance(parameter.annotation, str)
        assert f"        {parameter.name}: " in inspect.cleandoc(function.__doc__).replace("\n    ", "\n        ")
    assert "options:" not in function.__doc__.partition("Returns:")[0].partition("Attributes:")[0]


def test_only_the_norm_and_its_arguments_may_be_given_by_position():
    assert NormSwap("sn", {"eps": 1e-3}).swap_arguments()["norm_args"] == {"eps": 1e-3}
    with pytest.raises(TypeError, match=r"swap: too many positional arguments. It takes norm, norm_args, include"):
        swap(nn.Sequential(nn.BatchNorm2d(4)), "sn", {"eps": 1e-3}, ["0"])
    with pytest.raises(TypeError, match=r"NormSwap.__init__: too many positional arguments. It takes norm, .* plan"):
        NormSwap("sn", {"eps": 1e-3}, ["0"])


def test_an_argument_of_the_normalizer_is_told_where_it_goes():
    for call in (lambda **a: swap(nn.BatchNorm2d(4), **a), NormSwap):
        with pytest.raises(TypeError, match=r"GroupNorm takes .* type norm_args=\{'num_groups': 4, 'eps': 0.1\}"):
            call(norm="gn", num_groups=4, eps=0.1)
    with pytest.raises(TypeError, match=r"type norm_args=\{'momentum': 0.2\}"):
        NormSwap("sn", momentum=0.2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_groups'"):
        NormSwap("sn", num_groups=4, includ=["0"])


def test_an_unknown_argument_is_told_with_those_that_exist():
    with pytest.raises(TypeError, match=r"swap: got an unexpected keyword argument 'includ'. It takes norm, .*include"):
        swap(nn.Sequential(nn.BatchNorm2d(4)), "sn", includ=["0"])
    with pytest.raises(TypeError, match=r"missing a required argument: 'model'"):
        swap()


def test_what_is_wrong_is_told_before_a_model_is_looked_at():
    for wrong, error, said in (
        ({"norm": "switchabel"}, ValueError, "Did you mean 'sn'"),
        ({"rules": {".*": "switchabel"}}, ValueError, "Did you mean 'sn'"),
        ({"rules": ["sn"]}, TypeError, "rules must be a mapping"),
        ({"norm": "sn", "norm_args": ["eps"]}, TypeError, "norm_args must be a mapping"),
        ({"norm_args": {"eps": 1}, "rules": {".*": "sn"}}, ValueError, "without norm"),
        ({"norm": "sn", "sync_group": 0}, ValueError, "sync_group must be"),
        ({}, ValueError, "needs norm='sn'"),
    ):
        for make in (SwapOptions, NormSwap):
            with pytest.raises(error, match=said):
                make(**wrong)


def test_a_name_is_looked_up_once():
    options = SwapOptions("sn", norm_args={"eps": 0.1}, rules={"a": None, "b": {"class_path": "bcn"}})
    assert options.resolved_norm == (lightning_norm.SwitchableNorm, {"eps": 0.1})
    assert options.resolved_rules == {"a": None, "b": (lightning_norm.BatchChannelNorm, {})}
    assert options.resolved_norm is options.resolved_norm
    assert options.targets == {lightning_norm.SwitchableNorm, lightning_norm.BatchChannelNorm}


def test_without_docstrings_it_works_as_well():
    def function(first: int, options: SwapOptions) -> tuple[int, object]:
        return first, options.norm

    function.__doc__ = None
    decorated = takes_options(SwapOptions)(function)
    assert decorated(3, "sn") == (3, "sn")
    assert decorated.__doc__ is None
