"""create(norm, num_features): what it takes, and what it says otherwise."""

import pytest

from lightning_norm import create, normalizers

KEYS = [key for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")]


@pytest.mark.parametrize("key", KEYS)
def test_text_is_a_number_or_an_error(key):
    arguments = normalizers()[key].test_arguments
    assert create(key, 6, **arguments, eps="1e-3").eps == 1e-3
    with pytest.raises(ValueError, match=r"\w+: eps must be a number, got the text 'small'. Type it like 1.0e-3"):
        create(key, 6, **arguments, eps="small")
    with pytest.raises(ValueError, match=r"eps must be a number >= 0, got '1e-3'"):
        normalizers()[key](6, **arguments, eps="1e-3")


@pytest.mark.parametrize(("key", "typo", "meant"), [("sn", "momentun", "momentum"), ("gn", "group", "num_groups")])
@pytest.mark.parametrize("form", ["argument", "init_args"])
def test_an_unknown_argument_names_class_and_nearest(key, typo, meant, form):
    spec, arguments = (key, {typo: 1}) if form == "argument" else ({"class_path": key, "init_args": {typo: 1}}, {})
    said = f"{normalizers()[key].__name__} takes no argument '{typo}'. Did you mean '{meant}'"
    with pytest.raises(TypeError, match=said):
        create(spec, 8, **arguments)
