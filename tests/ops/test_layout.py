import pytest
import torch

from lightning_norm.ops.layout import at_least_float32, layout_of, stat_dtype


@pytest.mark.parametrize(
    ("shape", "channel_dim", "reduced", "size"),
    [
        ((5, 6), 1, (), 1),
        ((5, 6), -1, (), 1),
        ((5, 6, 7), 1, (2,), 7),
        ((5, 7, 6), -1, (1,), 7),
        ((5, 6, 7, 3), 1, (2, 3), 21),
        ((5, 7, 3, 6), -1, (1, 2), 21),
        ((5, 6, 2, 7, 3), 1, (2, 3, 4), 42),
        ((5, 2, 7, 3, 6), -1, (1, 2, 3), 42),
        ((0, 6, 7), 1, (2,), 7),
    ],
)
def test_axes(shape, channel_dim, reduced, size):
    layout = layout_of(torch.zeros(shape), 6, channel_dim)
    assert (layout.n, layout.c, layout.reduced, layout.size) == (shape[0], 6, reduced, size)
    t = torch.arange(shape[0] * 6).reshape(shape[0], 6)
    broadcast = layout.broadcast_to_input(t) + torch.zeros(shape)
    expected = broadcast.mean(reduced) if reduced else broadcast
    assert torch.equal(expected, t.float())


def test_a_layout_is_hashable_and_frozen():
    layout, twin = (layout_of(torch.zeros(5, 6, 7), 6) for _ in range(2))
    assert layout == twin
    assert hash(layout) == hash(twin)
    with pytest.raises(AttributeError):
        layout.channel_dim = 2


@pytest.mark.parametrize(
    "x", [torch.zeros(5, 6).long(), torch.zeros(5, 6).bool(), torch.zeros(5, 6).cfloat(), [1.0], None]
)
def test_type_error(x):
    with pytest.raises(TypeError, match="SN expects a floating-point tensor, got"):
        layout_of(x, 6, 1, "SN")


@pytest.mark.parametrize("shape", [(), (6,), (1, 6, 1, 1, 1, 1)])
def test_rank_error(shape):
    with pytest.raises(ValueError, match=rf"got {len(shape)} dimensions?: \({', '.join(map(str, shape))}"):
        layout_of(torch.zeros(shape), 6)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_the_remedy_for_many_axes_is_one(channel_dim):
    x = torch.zeros(2, 6, 3, 3, 3, 6)
    with pytest.raises(ValueError, match="Merge axes: ") as error:
        layout_of(x, 6, channel_dim)
    remedy = str(error.value).partition("Merge axes: ")[2].rstrip(".")
    merged = eval(remedy, {"x": x})
    assert layout_of(merged, 6, channel_dim).c == 6


def test_channel_errors_name_what_to_type():
    with pytest.raises(ValueError, match=r"num_features=6, but axis 1 of input \(5, 7, 6\) has 7.*pass channel_dim=-1"):
        layout_of(torch.zeros(5, 7, 6), 6)
    with pytest.raises(ValueError, match=r"num_features=6, but axis 2 of input \(5, 6, 7\) has 7.*pass channel_dim=1"):
        layout_of(torch.zeros(5, 6, 7), 6, -1)
    with pytest.raises(ValueError, match=r"axis 1 of input \(5, 7, 8\) has 7\.$"):
        layout_of(torch.zeros(5, 7, 8), 6)
    with pytest.raises(ValueError, match="channel_dim must be 1"):
        layout_of(torch.zeros(5, 6), 6, 0)


def test_no_element_per_channel():
    with pytest.raises(ValueError, match=r"\(5, 6, 0, 3\) has no element per channel"):
        layout_of(torch.zeros(5, 6, 0, 3), 6)


def test_dtypes():
    for passed, wide, stat in (
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float64),
    ):
        assert at_least_float32(passed) == wide
        assert stat_dtype(torch.zeros(1, dtype=passed)) == stat
    assert at_least_float32(None) == torch.float32


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [lambda x: x.long(), lambda x: x > 0, lambda x: x.numpy(), lambda x: x.tolist(), quantized]
)
def test_what_the_message_says_to_type_works(make):
    with pytest.raises(TypeError, match="expects a floating-point tensor") as told:
        layout_of(make(torch.rand(5, 6)), 6)
    typed = str(told.value).partition("Convert it first: ")[2].rstrip(".")
    assert layout_of(eval(typed, {"torch": torch, "x": make(torch.rand(5, 6))}), 6).c == 6


def test_no_half_of_a_complex_tensor_is_dropped():
    with pytest.raises(TypeError, match=r"got torch.complex64 tensor.$"):
        layout_of(torch.zeros(5, 6).cfloat(), 6)
