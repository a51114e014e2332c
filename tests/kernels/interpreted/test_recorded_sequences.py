"""Any sequence of calls over one layer gives, bit for bit, what the same calls give that nothing was recorded of.

Between two calls something changes: the layer, its tensors, the input, or who looks on. The twin forgets all that it
remembers before each call, and a dispatch mode watches it, so that it goes by the operators.
"""

import contextlib
import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_norm
from lightning_norm.layers.fused_specs import SPECS
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.testing.kit import noise

C = 6
KEYS = [("bn", {}), ("ubn", {"threshold": 0.5, "min_updates": 0})]
MORE = [
    ("sn", {}), ("rbn", {}), ("bnet", {}), ("afn", {"dropout": 0.3}), ("in", {}), ("ln", {}), ("gn", {"num_groups": 2}),
    ("bcn", {}), ("dbn", {}), ("asr", {}), ("ibn", {}), ("cn", {"context": "gate"}), ("ubn", {}),
    ("bn", {"momentum": None, "affine": False}), ("dbn", {"power": None, "average": "var", "alpha": 0.3}),
]  # fmt: skip
CASES = [
    *((key, arguments, 0, 3) for key, arguments in KEYS),
    *(pytest.param(k, a, s, 12, marks=pytest.mark.slow) for k, a in [*KEYS, *MORE] for s in range(1, 4)),
]


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Changed(nn.Module):
    """Mixed into a layer's class: the same equations, which nobody can tell from others."""

    def algebra(self, m):
        affine = super().algebra(m)
        return type(affine)(affine.center, affine.scale * 2, affine.shift)


def start(t, how):
    """The values of t in memory that begins, or is ordered, in another way."""
    if how == "anywhere":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if how == "strided":
        return torch.stack([t, t], -1)[..., 0]
    return t.clone()


# Each draws its numbers first, and returns what is done to both layers.


def mode(draw, layer):
    training = draw.random() < 0.5
    return lambda layer: layer.train(training)


def eps(draw, layer):
    value, how = draw.choice([1e-5, 0.5, 1]), draw.choice([setattr, object.__setattr__, into_vars])
    return lambda layer: how(layer, "_eps", value)


def into_vars(layer, name, value):
    vars(layer)[name] = value


def scheduled(draw, layer):
    name = draw.choice(sorted(layer.ranges))
    value = draw.choice([0.3, 0.7])
    return lambda layer: setattr(layer, name, value) if getattr(layer, name) is not None else None


def written_value(draw, layer):
    name, value = draw.choice(sorted(layer.ranges)), draw.choice([0.0, 0.2, 0.6])
    return lambda layer: None if layer.scheduled(name) is None else layer.scheduled(name).fill_(value)


def parameter(draw, layer):
    name = draw.choice([n for n, _ in layer.named_parameters()] or ["weight"])
    seed, how, where = (
        draw.randrange(100),
        draw.choice(["", "anywhere", "strided"]),
        draw.choice(["set", "into", "data"]),
    )

    def change(layer):
        old = layer._parameters[name]
        if old is None:
            return
        new = start(noise(*old.shape, seed=seed).to(old.dtype), how)
        if where == "data":
            old.data = new
        elif where == "set":
            setattr(layer, name, nn.Parameter(new))
        else:
            layer._parameters[name] = nn.Parameter(new)

    return change


def buffer(draw, layer):
    name = draw.choice(sorted(n for n, t in layer._buffers.items() if t is not None and t.dim() == 1) or [""])
    seed, how, where = (
        draw.randrange(100),
        draw.choice(["", "anywhere", "strided"]),
        draw.choice(["set", "into", "data"]),
    )

    def change(layer):
        if not name:
            return
        old = layer._buffers[name]
        new = start(noise(*old.shape, seed=seed).square().to(old.dtype) + 0.5, how)
        if where == "data":
            old.data = new
        elif where == "set":
            setattr(layer, name, new)
        else:
            layer._buffers[name] = new

    return change


def precision(draw, layer):
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
    return lambda layer: layer.to(dtype)


def one_precision(draw, layer):
    name = draw.choice([n for n, _ in layer.named_parameters()] or [""])

    def change(layer):
        if name:
            p = layer._parameters[name]
            p.data = p.data.to(torch.float16 if p.dtype == torch.float32 else torch.float32)

    return change


def loaded(draw, layer):
    assign = draw.random() < 0.5
    state = {k: t.clone() for k, t in layer.state_dict().items()}
    for i, t in enumerate(state.values()):
        if t.is_floating_point() and t.dim():
            t.add_(0.1 * noise(*t.shape, seed=i).square().to(t.dtype))
    return lambda layer: layer.load_state_dict(copy.deepcopy(state), assign=assign)


def trained(draw, layer):
    name = draw.choice([n for n, _ in layer.named_parameters()] or [""])
    return lambda layer: (
        layer._parameters[name].requires_grad_(not layer._parameters[name].requires_grad) if name else 0
    )


def tracking(draw, layer):
    return lambda layer: setattr(layer, "track_running_stats", not layer.track_running_stats)


def window(draw, layer):
    def change(layer):
        if layer._accumulator is not None:
            close_window(layer)
            layer._accumulator = None
        elif layer.track_running_stats and layer.has_running_stats and not layer.unsupported.window:
            open_window(layer)

    return change


def backend(draw, layer):
    name = draw.choice(["eager", "triton", "triton"])
    return lambda layer: setattr(layer, "backend", name)


def subclass(draw, layer):
    def change(layer):
        cls = type(layer)
        layer.__class__ = cls.__mro__[1] if issubclass(cls, Changed) else type("Changed", (Changed, cls), {})

    # Of the two classes under "Changed" the second is the layer's own.
    def back(layer):
        layer.__class__ = type(layer).__mro__[2]

    return back if issubclass(type(layer), Changed) else change


def method(draw, layer):
    def change(layer):
        if "algebra" in vars(layer):
            del layer.algebra
        else:
            layer.algebra = Twice(layer)

    return change


class Twice:
    def __init__(self, layer):
        self.layer = [layer]

    def __call__(self, m):
        affine = type(self.layer[0]).algebra(self.layer[0], m)
        return type(affine)(affine.center, affine.scale * 2, affine.shift)


def nothing(draw, layer):
    return lambda layer: None


CHANGES = [
    *[mode, eps, scheduled, written_value, parameter, buffer, precision, one_precision, loaded, trained, nothing] * 2,
    tracking, window, backend, subclass, method,
]  # fmt: skip


def moved(layer, how):
    """The layer after a journey."""
    if "algebra" in vars(layer) or type(layer).__name__ == "Changed":
        return layer
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    if how == "copy":
        twin = copy.copy(layer)
        layer.eps = 3.0  # the other one's
        return twin
    if how == "file":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return layer


def draw_input(draw):
    shape = draw.choice([(2, C, 3, 2), (2, C, 3, 2), (4, C, 2, 8), (3, C, 1, 2)])
    x = 1.5 * noise(*shape, seed=draw.randrange(5)) + 0.3
    x = x.to(draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    how = draw.choice([*[""] * 6, *["channels_last", "anywhere"] * 2, "transposed", "odd", "negative"])
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == "transposed":
        x = x.transpose(2, 3)
    elif how == "odd" and 1 in x.shape:  # any stride is one for an axis of one element
        x = x.clone().as_strided(x.shape, [7 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
    elif how == "negative":
        x = torch._neg_view(x)
    else:
        x = start(x, how)
    dy = noise(*x.shape, seed=draw.randrange(5)).to(x.dtype)
    dy = draw.choice(
        [lambda: dy, lambda: dy.contiguous(memory_format=torch.channels_last), lambda: dy[:1, :1].expand(dy.shape)]
    )()
    residual, activation = None, draw.choice(["none", "none", "relu", "silu"])
    if draw.random() < 0.3:
        residual = draw.choice([x, noise(*x.shape, seed=3).to(x.dtype), start(dy.contiguous(), "anywhere"), dy.float()])
    return x, dy, activation, residual


def halved(t):
    return t.half() if t.is_floating_point() and t.dtype == torch.float32 else t


def call(layer, x, dy, activation, residual, how):
    """Everything that comes out of a call, or the kind of error."""
    out = {}
    where = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "saved on the CPU": torch.autograd.graph.save_on_cpu,
        "saved in half": lambda: torch.autograd.graph.saved_tensors_hooks(halved, lambda t: t),
    }.get(how, contextlib.nullcontext)  # fmt: skip
    x = x.detach().requires_grad_(how != "constant")
    if residual is not None and residual.shape == x.shape:
        residual = residual.detach().requires_grad_()
    torch.manual_seed(5)
    for p in layer.parameters():
        p.grad = None
    try:
        with where():
            if how == "functional_call":
                tensors = {n: 2 * p for n, p in layer.named_parameters()}
                y = torch.func.functional_call(layer, tensors, (x, activation, residual))
            elif how == "torch.func":
                return {"dx": torch.func.grad(lambda x: (layer(x, activation, residual) * dy).sum())(x.detach())}
            elif how == "vmap":
                return {"y": torch.func.vmap(lambda x: layer(x, activation))(torch.stack([x.detach(), 2 * x.detach()]))}
            elif how == "many gradients":
                y = layer(x, activation, residual)
                both = torch.stack([dy, 2 * dy])
                return {"y": y.detach(), "dx": torch.autograd.grad(y, x, both, is_grads_batched=True)[0]}
            elif how == "checkpoint":
                y = torch.utils.checkpoint.checkpoint(layer, x, activation, residual, use_reentrant=False)
            else:
                y = layer(x, activation, residual)
        out["y"], out["strides"] = y.detach(), y.stride()
        if y.requires_grad:
            y.backward(dy)
            if how == "hooks":
                layer(x, activation, residual).backward(dy)  # gradients add up
        out |= {f"d{n}": p.grad for n, p in layer.named_parameters()}
        out |= {"dx": x.grad, "dresidual": None if residual is None else residual.grad}
    except Exception as error:
        out = {"error": type(error)}
    return out | {n: t.clone() for n, t in layer.named_buffers()}


HOWS = [
    *[""] * 12, "constant", "no_grad", "no_grad", "inference_mode", "autocast", "saved on the CPU", "saved in half",
    "functional_call", "torch.func", "vmap", "many gradients", "checkpoint", "hooks",
]  # fmt: skip


def bits(t):
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def differ(a, b):
    if not isinstance(a, torch.Tensor):
        return a != b
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    return a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b))


def compare(layer, twin, args, how, log):
    ours = call(layer, *args, how)
    vars(twin).pop(SPECS, None)
    with Watch():
        theirs = call(twin, *args, how)
    if how == "saved in half" and "error" in theirs:
        return  # the kernels behind the operators want statistics in float32
    assert ours.keys() == theirs.keys(), f"{ours.get('error')} {theirs.get('error')}\n" + "\n".join(log)
    wrong = [name for name, t in ours.items() if differ(t, theirs[name])]
    assert not wrong, f"{wrong}:\n" + "\n".join(log)


UNSEEN = {
    "an attribute in __dict__": lambda layer: vars(layer).update(_eps=0.5),
    "an attribute by object": lambda layer: object.__setattr__(layer, "_eps", 2.0),
    "a parameter in its dictionary": lambda layer: layer._parameters.update(bias=nn.Parameter(torch.ones(C))),
    "a buffer in its dictionary": lambda layer: layer._buffers.update(running_mean=torch.ones(C)),
    "a value in its tensor": lambda layer: layer.scheduled("momentum").fill_(0.5),
    "a parameter's memory": lambda layer: setattr(layer.weight, "data", start(torch.arange(6.0), "strided")),
    "a buffer's memory": lambda layer: setattr(layer.running_var, "data", start(torch.ones(C), "strided")),
    "a parameter's dtype": lambda layer: setattr(layer.bias, "data", torch.full((C,), 0.3).half()),
    "the mode in __dict__": lambda layer: vars(layer).update(training=False),
}


def test_changes_that_no_setattr_sees():
    layer = lightning_norm.create("bn", C)
    layer.backend = "triton"
    twin, log = copy.deepcopy(layer), []
    args = noise(2, C, 3, 2), noise(2, C, 3, 2, seed=7), "none", None
    for name, change in UNSEEN.items():
        log.append(name)
        compare(layer, twin, args, "", log)
        with torch.no_grad():
            change(layer), change(twin)
        compare(layer, twin, args, "", log)


@pytest.mark.parametrize(("key", "arguments", "seed", "steps"), CASES)
def test_any_sequence_of_calls(key, arguments, seed, steps):
    draw = random.Random(f"{key} {arguments} {seed}")
    layer = lightning_norm.create(key, C, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
    layer.backend = "triton"
    twin, log, args = copy.deepcopy(layer), [], draw_input(draw)

    for _ in range(steps):
        args = args if draw.random() < 0.5 else draw_input(draw)
        change, how = draw.choice(CHANGES), draw.choice(HOWS)
        journey = draw.choice(["deepcopy", "pickle", "copy", "file", *[""] * 12])
        x = args[0]
        log.append(f"{change.__name__} {journey} {how} {tuple(x.shape)} {x.stride()} {x.dtype} {args[2]}")
        # Recorded, then used again behind a change.
        compare(layer, twin, args, "", log)
        do = change(draw, layer)
        with torch.no_grad():
            do(layer), do(twin)
        layer, twin = moved(layer, journey), moved(twin, journey)
        compare(layer, twin, args, how, log)
