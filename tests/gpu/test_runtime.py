"""CUDA graphs, torch.compile, streams, devices, no waiting for the device."""

import copy

import pytest
import torch

from tests.gpu.layers import LAYERS, NAMES, close, equal, inputs, layer_of, results

each = pytest.mark.parametrize(("key", "arguments"), LAYERS, ids=NAMES)
STEPS = 4


def trainer(layer, x, target):
    """One step of training on x and target, which stay where they are."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.01, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = (layer(x).float() * target).sum() / x.shape[0]
        loss.backward()
        optimizer.step()

    return step


def everything(layer):
    return {name: t.detach().clone() for name, t in layer.state_dict().items()}


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@each
def test_a_training_step_in_a_cuda_graph(key, arguments, form, cuda, plain_memory):
    """Captured once, replayed on other data: parameters and running statistics as without."""
    data = [inputs(cuda, form, seed=10 * i + 1)[:2] for i in range(STEPS)]
    plain = layer_of(key, arguments, cuda, form)
    recorded = copy.deepcopy(plain)
    static = [tuple(t.clone() for t in data[0]) for _ in range(2)]
    steps = [trainer(layer, *tensors) for layer, tensors in zip((plain, recorded), static, strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps:
            for _ in range(3):
                step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps[1]()
    for batch in data:
        for run, tensors in zip((steps[0], graph.replay), static, strict=True):
            for old, new in zip(tensors, batch, strict=True):
                old.copy_(new)
            run()
    torch.cuda.synchronize()
    close(everything(recorded), everything(plain), 1e-5)


def steps_of(layer, run, device, form):
    """Results of a few batches: every output, gradient and buffer on the way."""
    collected = {}
    for i in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        x, dy, _ = inputs(device, form, seed=10 * i + 1)
        x.requires_grad_()
        y = run(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        names = ("dx", *(name for name, _ in layer.named_parameters()))
        after = {"y": y, **dict(zip(names, grads, strict=True)), **dict(layer.named_buffers())}
        collected |= {f"{i} {name}": t.detach().clone() for name, t in after.items()}
    return collected


def test_dropout_in_a_cuda_graph(cuda, plain_memory):
    """A graph recorded after eager steps, each replay of which draws anew."""
    layer = layer_of("afn", {"dropout": 0.3}, cuda)
    x, dy, _ = inputs(cuda)
    x.requires_grad_()
    for _ in range(3):
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], dy)
    outputs = []
    for _ in range(8):
        graph.replay()
        outputs.append(y.detach().clone())
    assert all(t.isfinite().all() for t in outputs)
    assert any(not torch.equal(outputs[0], t) for t in outputs[1:])


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@each
def test_compiled(key, arguments, form, device, plain_memory):
    """One graph, the same results over several steps; interpreted, without Inductor."""
    torch._dynamo.reset()
    n = 16 if device == "cuda" else 3
    plain = layer_of(key, arguments, device, form, n)
    layer = copy.deepcopy(plain)
    how = "inductor" if device == "cuda" else "aot_eager"
    got = steps_of(layer, torch.compile(layer, fullgraph=True, backend=how), device, form)
    close(got, steps_of(plain, plain, device, form), 1e-5)


@each
def test_compiled_into_cuda_graphs(key, arguments, cuda, plain_memory):
    """mode="reduce-overhead": recorded, not skipped, and running statistics move."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = layer_of(key, arguments, cuda)
    layer = copy.deepcopy(plain)
    got = steps_of(layer, torch.compile(layer, fullgraph=True, mode="reduce-overhead"), cuda, "contiguous")
    close(got, steps_of(plain, plain, cuda, "contiguous"), 1e-5)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("key", ["sn", "ubn", "bnet"])
def test_a_layer_compiles_itself(key, cuda, plain_memory):
    plain = layer_of(key, {}, cuda)
    layer = copy.deepcopy(plain)
    layer.compile()
    close(steps_of(layer, layer, cuda, "contiguous"), steps_of(plain, plain, cuda, "contiguous"), 1e-5)


@each
def test_side_stream(key, arguments, cuda, plain_memory):
    """Launches go to the current stream: a long queue on the default stream does not hold them, nor do they race it."""
    layer = layer_of(key, arguments, cuda)
    x, dy, _ = inputs(cuda)
    want = results(copy.deepcopy(layer), x, dy)
    torch.cuda.synchronize()
    side, other = torch.cuda.Stream(), copy.deepcopy(layer)
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = x * 1  # written by this stream after a while: whoever reads it on another stream reads too early
        got = results(other, late, dy)
    side.synchronize()
    equal(got, want)


@each
def test_nothing_waits_for_the_device(key, arguments, cuda, plain_memory):
    layer = layer_of(key, arguments, cuda)
    x, dy, _ = inputs(cuda)
    results(layer, x, dy)  # kernels are compiled and loaded
    with torch.no_grad():
        layer.eval()(x)
    layer.train()
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
        with torch.no_grad():
            layer.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("key", ["sn", "rbn", "bnet"])
def test_second_device(key, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    layer = layer_of(key, {}, cuda)
    x, dy, _ = inputs(cuda)
    want = results(copy.deepcopy(layer), x, dy)
    got = results(copy.deepcopy(layer).to("cuda:1"), x.to("cuda:1"), dy.to("cuda:1"))
    assert got["y"].device.index == 1
    equal({name: t.to(cuda) for name, t in got.items()}, want)


@pytest.mark.parametrize("key", ["sn", "ubn"])
def test_checkpointing(key, device, plain_memory):
    layer = layer_of(key, {}, device).eval()
    x, dy, _ = inputs(device)
    x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    again = layer(x)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(again, x, dy)[0])
