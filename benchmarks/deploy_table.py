"""Which normalizer reaches which target, checked: export, load, run, compare.

    python -m benchmarks.deploy_table [--norms sn,dbn] [--targets onnx,export,aot,int8] [--write]

Each normalizer stands twice in a small trained network, which goes to each target folded where it folds and as it is
otherwise. What comes out is run on random inputs, on edge cases and on other batch and image sizes, and compared with
the network in eager mode. ``--write`` puts the rows into docs/deployment.md, where those of other normalizers stay. It
needs the extra ``export``, and AOTInductor a C++ compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_norm import QuantizationError, contexts, fold, normalizers, quantize, swap
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.text_tables import aligned

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "deployment.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.deploy_table --write -->", "<!-- end of written -->"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gn": {"num_groups": 2},
    "cn": {"context": "ids"},
    "ubn": {"threshold": 0.9},
    "dbn": {"power": 0.5},
}
"""Where the default does not say what is meant, or cannot be trained in this network."""
TOLERANCE = 1e-3
"""Of the largest output: at a constant image a rounding is divided by sqrt(eps), about 300 times."""
INT8_TOLERANCE = 0.1
"""8 bits, in three layers, of a network whose outputs are small."""


def network(key: str) -> nn.Module:
    """Return a small network with two layers of a normalizer, trained for some steps, in evaluation mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    with warnings.catch_warnings():
        # dyt and derf say that they do not replace BatchNorm without loss.
        warnings.simplefilter("ignore")
        swap(model, key, norm_args=ARGUMENTS.get(key, {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        with contexts(model, torch.arange(8) % 3) if key == "cn" else contextlib.nullcontext():
            model(torch.randn(8, 3, 12, 12) + 0.5).square().mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def inputs(image: tuple[int, int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield random inputs of several batch and image sizes, and edge cases."""
    generator = torch.Generator().manual_seed(1)
    for n, *size in ((4, 12, 12), (1, 12, 12), (7, 9, 17)):
        height, width = image or size
        yield f"{n} x 3 x {height} x {width}", torch.randn(n, 3, height, width, generator=generator)
    x = torch.randn(4, 3, 12, 12, generator=generator)
    yield "zeros", torch.zeros_like(x)
    yield "a constant", torch.full_like(x, 3.0)
    yield "tiny", x * 1e-6
    yield "large", x * 1e4
    yield "far from zero", x + 1e3


def compared(run: Callable[[Tensor], Tensor], model: nn.Module, tolerance: float, image: Any = None) -> float:
    """Return the largest difference, relative to the largest output.

    Raises:
        AssertionError: it is greater than the tolerance, or not a number.
    """
    worst = 0.0
    for name, x in inputs(image):
        y, expected = run(x), model(x)
        assert y.shape == expected.shape, f"{name}: {tuple(y.shape)} in place of {tuple(expected.shape)}"
        off = float((y - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        assert off <= tolerance, f"{name}: off by {off:.2g}"
        worst = max(worst, off)
    return worst


def exported(model: nn.Module) -> tuple[torch.export.ExportedProgram, tuple[int, int] | None]:
    """Return the program for any batch, and any image where that goes; else the size of the image."""
    x, auto = torch.randn(4, 3, 12, 12), torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    try:
        program.module()(torch.randn(2, 3, 9, 17))
    except (RuntimeError, AssertionError):
        return torch.export.export(model, (x,), dynamic_shapes=({0: auto},)), (12, 12)
    return program, None


def to_onnx(model: nn.Module, folder: Path) -> str:
    """Export to ONNX, and run it in onnxruntime."""
    import onnxruntime

    _, image = exported(model)
    auto = torch.export.Dim.AUTO
    dynamic = ({0: auto} if image else {0: auto, 2: auto, 3: auto},)
    made = torch.onnx.export(model, (torch.randn(4, 3, 12, 12),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert made is not None
    made.save(str(folder / "net.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: x.numpy()})[0]))

    return _said(compared(run, model, TOLERANCE, image), image)


def to_program(model: nn.Module, folder: Path) -> str:
    """Save with torch.export, and load and run it in a process in which this package cannot be imported."""
    program, image = exported(model)
    torch.export.save(program, folder / "net.pt2")
    torch.save([x for _, x in inputs(image)], folder / "inputs.pt")
    script = """
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("lightning_norm", "lightning", "triton"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import torch
        program = torch.export.load("net.pt2").module()
        torch.save([program(x) for x in torch.load("inputs.pt")], "outputs.pt")
    """
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    outputs = iter(torch.load(folder / "outputs.pt"))
    return _said(compared(lambda _: next(outputs), model, TOLERANCE, image), image)


def to_aot(model: nn.Module, folder: Path) -> str:
    """Compile ahead of time with AOTInductor, and load and run it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler here"
    program, image = exported(model)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "net_aot.pt2"))
    return _said(compared(torch._inductor.aoti_load_package(package), model, TOLERANCE, image), image)


def to_int8(model: nn.Module, folder: Path) -> str:
    """Quantize to static int8, with random calibration data."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = quantize(model, [torch.randn(8, 3, 12, 12) for _ in range(4)])
    x = torch.randn(16, 3, 12, 12)
    y, expected = quantized(x), model(x)
    off = float((y - expected).abs().max() / expected.abs().max())
    assert off <= INT8_TOLERANCE, f"off by {off:.2g}"
    stays = any("stay in float" in str(w.message) for w in caught)
    return f"{off:.0e}{', normalizers in float' if stays else ''}"


TARGETS: dict[str, Callable[[nn.Module, Path], str]] = {
    "onnx": to_onnx,
    "export": to_program,
    "aot": to_aot,
    "int8": to_int8,
}
HEADINGS = {
    "norm": "normalizer",
    "fold": "in the network",
    "onnx": "ONNX, onnxruntime",
    "export": "torch.export, loaded without this package",
    "aot": "AOTInductor",
    "int8": "int8 (PT2E)",
}


def row(key: str, targets: list[str]) -> dict[str, str]:
    """Return what one normalizer does at each target."""
    model = network(key)
    with torch.no_grad():
        report = fold(model, torch.randn(4, 3, 12, 12))
    left = [layer for layer in model.modules() if isinstance(layer, Normalizer)]
    what = "folded" if report.names("folded") else "torch's own layer" if not left else "as it is"
    cells = {"norm": key, "fold": what}
    for target in targets:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cells[target] = TARGETS[target](copy.deepcopy(model), Path(folder))
            except QuantizationError as error:
                cells[target] = f"no: {str(error).partition(': ')[2].partition(': ')[0]}"
            except Exception as error:
                cells[target] = f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    return cells


def markdown(rows: list[dict[str, str]], targets: list[str]) -> str:
    """Return the table in Markdown."""
    names = ["norm", "fold", *targets]
    lines = [[HEADINGS[name] for name in names], ["---"] * len(names)]
    lines += [[cells.get(name, "") for name in names] for cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_rows(text: str, rows: list[dict[str, str]], targets: list[str]) -> str:
    """Return the page with these rows; those of other normalizers stay, if they have the same columns."""
    head, rule, *new = markdown(rows, targets).splitlines()
    old = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    kept = old[2:] if old[:1] == [head] else []
    lines = {line.split()[1]: line for line in (*kept, *new)}
    table = "\n".join([BEGIN, head, rule, *(lines[key] for key in normalizers() if key in lines), END])
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table, text, flags=re.S)


def _said(off: float, image: Any) -> str:
    """Return the error, and which sizes may vary."""
    return f"{off:.0e}{', batch varies' if image else ''}"


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--norms", default=",".join(normalizers()))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--rows", type=Path, help="file of finished rows: what it has is not done again")
    arguments = parser.parse_args(argv)
    targets, rows = arguments.targets.split(","), []
    finished: dict[str, dict[str, str]] = {}
    if arguments.rows and arguments.rows.exists():
        for cells in map(json.loads, arguments.rows.read_text().splitlines()):
            finished.setdefault(cells["norm"], {}).update(cells)
    for key in arguments.norms.split(","):
        cells = finished.get(key, {})
        if missing := [target for target in targets if target not in cells]:
            cells |= row(key, missing)
            if arguments.rows:
                with arguments.rows.open("a") as file:
                    print(json.dumps(cells), file=file)
        rows.append(cells)
        print(f"{key}: done", file=sys.stderr, flush=True)
    names = ["norm", "fold", *targets]
    print(aligned([[HEADINGS[n] for n in names], *([cells.get(n, "") for n in names] for cells in rows)]))
    if arguments.write:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows, targets), encoding="utf-8")


if __name__ == "__main__":
    main()
