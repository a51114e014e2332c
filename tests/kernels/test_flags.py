"""Flags of the kernels cross the operators' schemas as numbers, and come back as they were."""

from dataclasses import fields, replace

import pytest

from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.ops.fused.operators import from_numbers, to_numbers

FLAGS = [MixtureFlags.of(("in",)), PerChannelFlags(), PerChannelNumbers(1e-5), EncoderDecoderFlags(False)]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: type(flags).__name__)
def test_every_field_comes_back_with_its_type(flags):
    for field in fields(flags):
        value = getattr(flags, field.name)
        changed = replace(flags, **{field.name: not value if isinstance(value, bool) else value + 7})
        numbers = to_numbers(changed)
        assert all(type(number) in (int, float) for number in numbers)  # what a schema takes: no booleans
        back = from_numbers(type(flags), numbers)
        assert back == changed
        assert type(getattr(back, field.name)) is type(value)


def test_a_number_too_few_or_too_many_is_refused():
    numbers = to_numbers(PerChannelFlags())
    for wrong in (numbers[:-1], [*numbers, 0]):
        with pytest.raises(ValueError, match="zip"):
            from_numbers(PerChannelFlags, wrong)


@pytest.mark.parametrize(
    ("statistics", "frozen", "positions", "needs", "pools"),
    [
        (("bn",), False, (-1, -1, 0), True, (True, False)),
        (("bn",), True, (-1, -1, 0), False, (False, False)),
        (("in", "ln", "bn"), False, (0, 1, 2), True, (True, True)),
        (("bn", "ln"), True, (-1, 1, 0), True, (False, True)),
    ],
    ids=str,
)
def test_mixture_flags_of_statistics(statistics, frozen, positions, needs, pools):
    flags = MixtureFlags.of(statistics, weighted=True, frozen=frozen)
    assert (flags.at_in, flags.at_ln, flags.at_bn) == positions
    assert flags.num_weights == len(statistics)
    assert flags.needs_moments == needs
    assert (flags.pools_batch, flags.pools_layer) == pools
    assert MixtureFlags.of(statistics, weighted=True, outputs=True).num_weights == 0
