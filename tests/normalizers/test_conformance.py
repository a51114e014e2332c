"""Every registered normalizer against every check. Not to be edited for a new normalizer."""

import functools

import pytest

from lightning_norm import normalizers
from lightning_norm.testing import checks


@pytest.mark.parametrize("name", checks())
@pytest.mark.parametrize("key", normalizers())
def test_conformance(key, name):
    cls = normalizers()[key]
    checks()[name](functools.partial(cls, **cls.test_arguments))
