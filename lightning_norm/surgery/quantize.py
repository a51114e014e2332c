"""Static int8 for the CPU: a network that was folded becomes a program of 8-bit convolutions."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import LeftAloneWarning, QuantizationError, counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.walk import named_normalizers


@torch.no_grad()
def quantize(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    r"""Return the network with convolutions and linear layers in static int8, for inference on the CPU.

    .. math::
        x \approx s\,(q - z), \qquad q = \operatorname{clamp}(\operatorname{round}(x / s) + z, 0, 255)

    with scale s and zero point z of each activation from the range that it has on ``batches``, and of each output
    channel of a weight from that weight, symmetric in [-128, 127]. This is torch's PT2E quantization with its quantizer
    for x86; Krishnamoorthi 2018, arXiv 1806.08342, has the method. Call :func:`lightning_norm.fold` first: a normalizer
    that goes into its convolution is quantized with it, any other stays in float, and costs a way there and back.

    The model itself is not changed; the program takes any batch size, and ``torch.compile`` makes it fast.

    Args:
        model: on the CPU; it is put into evaluation mode.
        batches: some inputs to measure ranges on, a few hundred samples from the training data: tensors, or tuples that
            begin with one.

    Returns:
        The program, called as the model is.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        QuantizationError: the model is not on the CPU, ``batches`` holds no tensors, ``torch.export`` cannot trace the
            model, or torchao cannot quantize what it traced, such as a rbn that was not folded.

    Warns:
        LeftAloneWarning: normalizers stay in float; it says which and why.

    >>> quantize(nn.ReLU().to("meta"), [])
    Traceback (most recent call last):
    ...
    lightning_norm.errors.QuantizationError: quantize: batches is empty: pass some inputs, [x] at least.
    """
    samples = [_input_of(batch) for batch in batches]
    if not samples:
        raise QuantizationError("quantize: batches is empty: pass some inputs, [x] at least.")
    places = {t.device.type for t in (*model.parameters(), *model.buffers(), *samples)} - {"cpu"}
    if places:
        raise QuantizationError(
            f"quantize: int8 is for the CPU, and tensors are on {', '.join(sorted(places))}. Type model.cpu(), and "
            "give batches from the CPU."
        )
    if find_spec("torchao") is None:
        raise ModuleNotFoundError("quantize needs torchao: pip install 'lightning-norm[export]'.")
    model.eval()
    _warn_of_floats(model)
    with warnings.catch_warnings():
        # torchao and torch say what they deprecate of each other.
        warnings.simplefilter("ignore")
        pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        program = _program(model, samples[0])
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        try:
            observed = pt2e.prepare_pt2e(program, quantizer)
            for x in samples:
                observed(x)
            quantized: nn.Module = pt2e.convert_pt2e(observed)
            quantized(samples[0])
        except Exception as error:
            left = ", ".join(dict.fromkeys(type(layer).__name__ for _, layer in named_normalizers(model)))
            raise QuantizationError(
                f"quantize: torchao cannot make int8 of {type(model).__name__}"
                f"{f' with {left} in it, which was not folded' if left else ''}: {_first_line(error)}"
            ) from error
    return quantized


def _first_line(error: Exception) -> str:
    """Return what an error says first, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _input_of(batch: Any) -> Tensor:
    """Return the tensor that a batch is or begins with."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise QuantizationError(
            f"quantize: batches must be tensors of floats, or tuples that begin with one, got {type(first).__name__}."
        )
    return first


def _program(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the graph of the model, for any batch size.

    Raises:
        QuantizationError: the model cannot be traced.
    """
    x = x if len(x) > 1 else torch.cat([x, x])  # a batch of one would become a constant of the graph
    try:
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    except Exception as error:
        raise QuantizationError(
            f"quantize: torch.export cannot trace {type(model).__name__}, and int8 is made from its graph: "
            f"{_first_line(error)}"
        ) from error


def _reason(layer: Normalizer) -> str:
    """Return why a normalizer is no part of a convolution."""
    return layer.why_not_plain() if layer.eval_affine() is None else "it was not folded"


def _warn_of_floats(model: nn.Module) -> None:
    """Say which normalizers are no part of a convolution and stay in float."""
    left = list(named_normalizers(model))
    if left:
        name, layer = left[0]
        warnings.warn(
            f"quantize: {counted(len(left), 'normalizer stays', 'normalizers stay')} in float (first: {name}, "
            f"{type(layer).__name__}: "
            f"{_reason(layer)}). Call fold(model, example_input) before, and harden where a mixture has "
            "decided.",
            LeftAloneWarning,
            stacklevel=3,
        )
