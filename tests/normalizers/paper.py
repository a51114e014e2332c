"""What the paper tests share. A reference is the paper's equation on the whole tensor in float64, by autograd."""

import copy

import torch

F64 = torch.float64


def data(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(shape) - 2)
    spread = 1 + torch.rand(*shape[:2], *ones, generator=g, dtype=F64)
    return torch.randn(shape, generator=g, dtype=F64) * spread + torch.randn(*shape[:2], *ones, generator=g, dtype=F64)


def shaken(layer, seed=50):
    """The layer in float64 with every parameter and running statistic moved."""
    layer = layer.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(layer.named_parameters()):
            p += 0.4 * torch.randn(p.shape, generator=g, dtype=F64)
        for name in getattr(layer, "running_names", ("running_mean", "running_var")):
            if getattr(layer, name) is not None:
                getattr(layer, name).add_(torch.rand(layer.num_features, generator=g, dtype=F64))
    return layer


def along(t, x):
    """A (C,) tensor against x."""
    return t.reshape(1, -1, *(1,) * (x.dim() - 2))


def agrees(layer, reference, x, tolerance=1e-10):
    """Output and every gradient of ``layer`` and ``reference(x, parameters)``; 1e-10 is 1e5 roundings of float64."""
    dy = data(*x.shape, seed=99)
    names = [n for n, _ in layer.named_parameters()]
    a = x.clone().requires_grad_()
    ours = layer(a)
    da = torch.autograd.grad(ours, [a, *layer.parameters()], dy, materialize_grads=True, allow_unused=True)
    b = x.clone().requires_grad_()
    p = {n: v.detach().clone().requires_grad_() for n, v in layer.named_parameters()}
    theirs = reference(b, p)
    db = torch.autograd.grad(theirs, [b, *p.values()], dy, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for name, u, v in zip(["x", *names], da, db, strict=True):
        torch.testing.assert_close(
            u, v, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


def same_as_torch(ours, theirs, shape, steps=4, tolerance=1e-10):
    """Values, gradients, state_dict over several steps and in evaluation, from the same start."""
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(torch.randn_like(p))
            q.copy_(p)
    assert [k for k, _ in ours.state_dict().items()] == list(theirs.state_dict())
    for seed in range(steps + 1):
        if seed == steps:
            ours.eval(), theirs.eval()
        x, dy = data(*shape, seed=seed), data(*shape, seed=seed + 50)
        results = []
        for layer in (ours, theirs):
            a = x.clone().requires_grad_()
            y = layer(a)
            results.append((y, *torch.autograd.grad(y, [a, *layer.parameters()], dy)))
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=tolerance, atol=tolerance)
    twin = copy.deepcopy(theirs)
    twin.load_state_dict(ours.state_dict(), strict=True)
