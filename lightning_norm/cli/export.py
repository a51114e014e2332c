"""``lightning-norm export``: the network for inference, as a .pt2 file of torch.export or as ONNX.

The options of fit build the model: --config FILE, --model.arch resnet34, ... What is swapped is read
from the checkpoint, or else from the configuration: its section norm: {norm: sn}, or a NormSwap among the callbacks.

Examples:
  lightning-norm export --config examples/configs/digits_bcn.yaml --ckpt_path last.ckpt --shape 1x3x8x8 --out net.pt2
  lightning-norm export --config examples/configs/digits_bcn.yaml --ckpt_path last.ckpt --shape 1x3x8x8 --out net.onnx
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_norm.callbacks import NormSwap
from lightning_norm.cli.norm_cli import NormCLI
from lightning_norm.cli.parsing import CommandParser, own_options, path_of
from lightning_norm.cli.screen import without_noise
from lightning_norm.surgery.checkpoint_files import read_checkpoint
from lightning_norm.surgery.deploy import fold, to_plain
from lightning_norm.surgery.extras import require
from lightning_norm.surgery.harden import harden
from lightning_norm.surgery.manifest import load_weights, manifest_in, rebuild
from lightning_norm.surgery.swap import swap
from lightning_norm.surgery.whole_files import write_whole, writing_whole


def run(argv: Sequence[str]) -> None:
    """Export the network of a configuration.

    Args:
        argv: the arguments behind ``export``.

    Raises:
        ValueError: no input is known, or the network cannot take it; the file's ending is not .pt2 or .onnx.
        ModuleNotFoundError: a .onnx file is asked for and onnx is not installed.
        CheckpointError: the checkpoint cannot be read or does not fit.
        SystemExit: an argument or a configuration file is wrong.
    """
    # What this parser does not know is left to LightningCLI, which builds the model.
    export_parser = parser()
    options, rest = export_parser.parse_known_args(argv)
    if not options.out.endswith((".pt2", ".onnx")):
        raise ValueError(f"--out must end in .pt2 or .onnx, got {options.out!r}.")
    # Told now, and not after the model was built and loaded.
    if options.out.endswith(".onnx"):
        require("a .onnx file", "export", "onnx", "onnxscript")
    # Without the callback that saves the configuration: nothing is trained, and no folder is made.
    with without_noise():
        cli = NormCLI(rest, run=False, save_config_callback=None, parser_kwargs={"also": own_options(export_parser)})
    model = prepared(cli, options.ckpt_path)
    example = _example(model, options.shape)
    _check_input(model, example)
    # The layers are changed first, or the file would hold the graph of the swapped network.
    if options.harden is not None:
        print(harden(model, example, threshold=options.harden))
    if options.layers != "keep":
        print({"fold": fold, "plain": to_plain}[options.layers](model, example))
    write(model, example, options.out)
    load = "onnxruntime.InferenceSession({!r})" if options.out.endswith(".onnx") else "torch.export.load({!r}).module()"
    print(f"written to {options.out}; load it with {load.format(options.out)}")


def prepared(cli: NormCLI, path: str | None) -> pl.LightningModule:
    """Return the model of a configuration, swapped and loaded, in evaluation mode.

    Args:
        cli: with the model as it was built.
        path: of a checkpoint, whose manifest wins over the configuration; ``None`` for the weights of the model itself.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    model: pl.LightningModule = cli.model
    # The Trainer would call it; there is none here, and the layers that it builds are in the checkpoint.
    if is_overridden("configure_model", model, pl.LightningModule):
        model.configure_model()
    checkpoint: dict[str, Any] = {} if path is None else read_checkpoint(path)
    manifest = manifest_in(checkpoint, repr(path))
    # The checkpoint knows best what was swapped; the configuration may have changed since the training.
    if manifest is not None:
        rebuild(model, manifest, repr(path))
    else:
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
            if isinstance(callback, NormSwap):
                swap(model, **callback.swap_arguments())
    if path is not None:
        load_weights(model, checkpoint, path)
    return model.eval()


def write(model: torch.nn.Module, example: Tensor, out: str) -> None:
    """Write the model, for any batch size where its code allows that.

    Args:
        model: in evaluation mode.
        example: an input of two samples at least: a batch of one would become a constant of the graph.
        out: a path that ends in .pt2, for ``torch.export.load``, or in .onnx.
    """
    # Only the batch may vary; the other sizes decide what the network computes.
    dynamic = ({0: torch.export.Dim.AUTO},)
    with torch.no_grad():
        if out.endswith(".pt2"):
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
            # Through memory: torch's own writer ends the process where the disk is full.
            content = io.BytesIO()
            torch.export.save(program, content)
            write_whole(out, content.getvalue())
        else:
            # The exporter that reads the graph of torch.export; the older one traces, and fixes the batch size.
            made = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
            assert made is not None  # it is, without a file and with dynamo
            with writing_whole(out) as there:
                made.save(there, external_data=True)


def _example(model: pl.LightningModule, shape: str | None) -> Tensor:
    """Return a random input of the shape that was typed, or the module's own example.

    Args:
        model: whose ``example_input_array`` is taken where no shape was typed.
        shape: sizes joined by x; a batch of one becomes one of two.

    Raises:
        ValueError: neither is known.
    """
    if shape is not None:
        sizes = shape.lower().split("x")
        if not all(size.isdigit() and int(size) for size in sizes):
            raise ValueError(f"--shape must read like 1x3x32x32, got {shape!r}.")
        sizes[0] = str(max(2, int(sizes[0])))  # a batch of one would be taken for a constant
        return torch.randn([int(size) for size in sizes])
    example = model.example_input_array
    if not isinstance(example, Tensor):
        raise ValueError(
            f"the input of {type(model).__name__} is not known: type --shape 1x3x32x32 (say), or set "
            "example_input_array in it to a tensor."
        )
    return example


def _check_input(model: pl.LightningModule, example: Tensor) -> None:
    """Run the network once, before anything in it is changed.

    Args:
        model: in evaluation mode.
        example: its input.

    Raises:
        ValueError: the network cannot take it.
    """
    if not is_overridden("forward", model, pl.LightningModule):
        name = type(model).__name__
        raise ValueError(f"{name} has no forward, which export writes: def forward(self, x): return self.net(x), say.")
    try:
        with torch.no_grad():
            model(example)
    except (RuntimeError, ValueError, IndexError) as error:
        shape = "x".join(map(str, example.shape))
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{type(model).__name__} takes no input of {shape}: {reason}. Type --shape 1x3x32x32 (say), that of one of "
            "its inputs."
        ) from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options that are not LightningCLI's."""
    made = CommandParser(
        "export", "Write the network for inference: normalizers folded, or as torch's own layers.", __doc__
    )
    made.add_argument(
        "--out", type=path_of("--out net.pt2"), required=True, metavar="FILE", help="net.pt2 (torch.export) or net.onnx"
    )
    made.add_argument(
        "--ckpt_path", type=path_of("--ckpt_path last.ckpt"), metavar="FILE", help="weights, and what was swapped"
    )
    made.add_argument("--shape", help="of the input, 1x3x32x32; the model's example_input_array by default")
    made.add_argument(
        "--layers",
        choices=("fold", "plain", "keep"),
        default="fold",
        help="fold into convolutions (default), only make plain, or keep the normalizers",
    )
    made.add_argument(
        "--harden",
        type=float,
        metavar="THRESHOLD",
        help="first turn sn and bcn layers whose weights have decided into what they chose: 0.9, say",
    )
    return made
