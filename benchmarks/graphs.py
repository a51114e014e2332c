"""Count kernels and bytes of a layer in a graph of torch.compile, for each way a layer on the kernels may take there.

    python -m benchmarks.graphs
    python -m benchmarks.graphs bn --save docs/benchmarks/graphs.md

One training step with a ReLU behind the layer. Inductor's own scheduler is asked which buffers each of its kernels
reads and writes; what an operator of ours moves is what its passes over x move. T is the bytes of x. Nothing is timed:
the graph is one for the CPU, whose kernels hold the same loops as those for a GPU, but for how a reduction is split.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

# Before Triton is imported: the operators run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn

from lightning_norm import create
from lightning_norm.ops import backend

SHAPE = (2, 16, 64, 64)
OPERATORS = {
    "moments": (1, 1),
    "sums": (1, 2),
    "apply": (1, 2),
    "combine": (1, 3),
    "mixture_affine": (3, 1),
    "mixture_affine_and_track": (3, 1),
    "mixture_gradients": (4, 5),
}
"""Launches of each operator, and how many tensors of the size of x they read and write."""

WAYS = {
    "operators": ("operators", "none"),
    "operators, ReLU inside": ("operators", "relu"),
    "transparent": ("transparent", "none"),
    "transparent, ReLU inside": ("transparent", "relu"),
    "plain PyTorch": ("plain", "none"),
}
"""The way in a graph, and the activation that the layer is asked for; without one it stands behind the layer."""


def graph_of(gm: Any, inputs: list[Any]) -> Any:
    """Return Inductor's graph of the traced operations, with its kernels decided and nothing generated."""
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(inputs)
    assert mode is not None
    with DebugContext(), V.set_fake_mode(mode):
        record_original_output_strides(gm)
        _recursive_post_grad_passes(gm, is_inference=False)
        graph = GraphLowering(gm, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph._update_scheduler()
    return graph


def counts_of(graph: Any) -> tuple[int, float]:
    """Return kernels and bytes, in T."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    kernels, size = 0, 0.0
    with V.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            operator = getattr(getattr(node, "node", None), "op_overload", None)
            name = operator._schema.name.split("::")[1] if operator is not None else ""
            if name in OPERATORS:
                launches, passes = OPERATORS[name]
                kernels, size = kernels + launches, size + passes
            elif not isinstance(node, (NopKernelSchedulerNode, ExternKernelSchedulerNode)):
                kernels += 1
                size += node.get_read_write_buffers_sizes() / (4 * torch.Size(SHAPE).numel())
    return kernels, size


def count(step: Any) -> list[tuple[int, float]]:
    """Return the counts of each graph that a step compiles: forward, and backward."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    counts: list[tuple[int, float]] = []

    def counted(gm: Any, inputs: list[Any], **kwargs: Any) -> Any:
        counts.append(counts_of(graph_of(gm, inputs)))
        return make_boxed_func(gm.forward)

    torch.compiler.reset()
    step(lambda gm, inputs: compile_fx(gm, inputs, inner_compile=counted))
    return counts


def step_of(key: str, way: str) -> Any:
    """Return a training step of a compiled layer with a ReLU, as the way says."""
    mode, activation = WAYS[way]
    layer: Any = create(key, SHAPE[1])
    # On a CPU "auto" would take no kernel, and "triton" never takes plain PyTorch.
    layer.backend = "auto" if mode == "plain" else "triton"
    relu = nn.ReLU() if activation == "none" else nn.Identity()

    def forward(x: Tensor) -> Tensor:
        return relu(layer(x, activation))  # type: ignore[no-any-return]

    def step(compiler: Any) -> None:
        backend.IN_GRAPHS = mode
        x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
        torch.autograd.grad(torch.compile(forward, fullgraph=True, backend=compiler)(x), [x, *layer.parameters()], dy)

    return step


def table(keys: list[str]) -> list[str]:
    """Return the lines of a Markdown table, for each layer the fewest bytes first."""
    lines = ["| layer | way | kernels | bytes forward + backward, in T | sum |", "|---|---|---:|---:|---:|"]
    for key in keys:
        rows: dict[float, list[str]] = defaultdict(list)
        for way in WAYS:
            (launches, forward), (more, backward) = count(step_of(key, way))
            cells = f"{launches} + {more} | {forward:.1f} + {backward:.1f} | {forward + backward:.1f}"
            rows[forward + backward].append(f"| {key} | {way} | {cells} |")
        lines += [line for total in sorted(rows) for line in rows[total]]
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("keys", nargs="*", default=["bn", "sn"], help="normalizers of the mixtures, such as bn and sn")
    parser.add_argument("--save", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    lines = [f"x {SHAPE}, float32, contiguous; torch {torch.__version__}: `python -m benchmarks.graphs`", ""]
    lines += table(arguments.keys)
    print("\n".join(lines))
    if arguments.save is not None:
        arguments.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
