"""Every registered normalizer against every check. Not to be edited for a new normalizer."""

import functools

import pytest

from lightning_norm import normalizers
from lightning_norm.testing import checks

# Of graphs with a mask these show each way through the passes; the others take seconds each.
QUICK = ("bn", "sn", "bnet")
CASES = [
    pytest.param(key, name, marks=[pytest.mark.slow] * (name == "masked_compiled_equals_eager" and key not in QUICK))
    for key in normalizers()
    for name in checks()
]


@pytest.mark.parametrize(("key", "name"), CASES)
def test_conformance(key, name):
    cls = normalizers()[key]
    checks()[name](functools.partial(cls, **cls.test_arguments))
