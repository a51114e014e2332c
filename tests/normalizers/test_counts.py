"""Numbers of things are checked alike: a whole number above 0, whatever its type."""

import numpy as np
import pytest

from lightning_norm import create


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cn", "num_contexts"),
        ("afn", "std_ratio"),
        ("afn", "rescale_ratio"),
        ("asr", "std_ratio"),
        ("asr", "rescale_ratio"),
    ],
)
def test_a_count_is_a_whole_number(key, name):
    for value in (0, -1, 2.5, "2", None, True, float("nan")):
        with pytest.raises(ValueError, match=rf"{name} must be (a positive|an) int, got {value!r}"):
            create(key, 8, **{name: value})
    assert type(getattr(create(key, 8, **{name: np.int64(4)}), name)) is int
