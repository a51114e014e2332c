"""Swap the normalization of the models of timm, torchvision, segmentation_models_pytorch, monai and ultralytics.

    python benchmarks/zoo.py --norms sn,bn --libraries timm,torchvision

No weights are downloaded: they are random, and the running statistics are moved away from their start, so that a layer
that lost something shows. Each model and norm gives one line in --lines; a run that was stopped goes on after the last
one, and --markdown is written anew from all lines at the end.

A silent difference is a layer whose evaluation the report calls preserved and that evaluates to something else than
the layer it replaced, or a layer that lost a child (an activation, a dropout) of the one it replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_norm
from benchmarks.decoders import ConditionalUnet1d, VaeDecoder

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
LIBRARIES = ("timm", "torchvision", "smp", "monai", "ultralytics", "decoders")
TOLERANCE = 1e-4
"""Of a layer's or a model's evaluation, relative to its largest absolute output."""
BATCH = 2
EARLIER: dict[tuple[str, str], Row] = {}
"""Library and model -> a row of an earlier run: which one is the smallest, and which are measured quickly."""


@dataclass
class Model:
    """One representative of a family.

    Args:
        library: where it comes from.
        family: timm's module, else the model's name.
        name: of the model.
        build: makes it, given the size of the image, or ``None`` for its own.
        sizes: sizes of images to try in turn.
        shape: of the input without the batch, given the size.
    """

    library: str
    family: str
    name: str
    build: Callable[[int | None], nn.Module]
    sizes: tuple[int, ...] = (64, 96, 224)
    shape: Callable[[int], tuple[int, ...]] = lambda size: (3, size, size)


@dataclass
class Row:
    """The outcome for one model and one norm, in plain types.

    Args:
        source: "default", or "hint": the classes that the report says may be passed as ``source`` were passed as well.
        status: "ok", "skipped" or "error"; ``reason`` says why.
        left: layers that normalize by their name and were left alone, by class.
        preserved: layers whose evaluation the report calls preserved.
        silent: "layer: what is wrong", see the module's docstring.
        parity: relative difference of the evaluated outputs; ``None`` where a layer is to evaluate otherwise.
        step: "ok", or what the training step lacked.
        undo: "ok", or what is not bit-identical after it.
        export: "ok", or the error; "" where it was not asked for.
        measured: the name of the run, as ``--again`` gave it.
    """

    library: str
    family: str
    model: str
    norm: str
    source: str
    status: str = "ok"
    reason: str = ""
    parameters: int = 0
    size: int = 0
    candidates: int = 0
    swapped: int = 0
    left: dict[str, int] = field(default_factory=dict)
    preserved: int = 0
    silent: list[str] = field(default_factory=list)
    parity: float | None = None
    step: str = ""
    undo: str = ""
    export: str = ""
    seconds: float = 0.0
    measured: str = ""

    @property
    def id(self) -> tuple[str, str, str, str]:
        """What a run that goes on looks for."""
        return self.library, self.family, self.norm, self.source


# ---------------------------------------------------------------------------------------------------- the libraries


def parameters_of(library: str, name: str, build: Callable[[], nn.Module]) -> int:
    """Return the number of parameters without making them, where the model can be built on the meta device."""
    earlier = EARLIER.get((library, name))
    if earlier is not None and earlier.parameters:
        return earlier.parameters
    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # some initializations read values
        model = build()
    return sum(p.numel() for p in model.parameters())


def timm_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield the smallest model of each module of timm; those that are made for timm's own tests do not count."""
    timm = importlib.import_module("timm")
    for family in timm.list_modules():
        if not wanted(family):
            continue
        names = [n for n in timm.list_models(module=family) if not n.startswith("test_")]
        # To find the smallest, all are built.
        names = [n for n in names if ("timm", n) in EARLIER] or names
        counts = {}
        for name in names:
            with contextlib.suppress(Exception):
                counts[name] = parameters_of("timm", name, lambda name=name: timm.create_model(name, pretrained=False))  # type: ignore[misc]
        if not counts:
            yield Row("timm", family, "", "", "", "skipped", "no model of it can be built without further packages")
            continue
        name = min(counts, key=lambda n: counts[n])
        if counts[name] > limit:
            yield Row("timm", family, name, "", "", "skipped", f"{counts[name] / 1e6:.0f} M parameters", counts[name])
            continue
        pretrained = timm.get_pretrained_cfg(name)
        size = pretrained.input_size[-1] if pretrained is not None else 224

        def build(size: int | None, name: str = name) -> nn.Module:
            try:
                return timm.create_model(name, pretrained=False, img_size=size)  # type: ignore[no-any-return]
            except TypeError:
                return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]

        yield Model("timm", family, name, build, tuple(dict.fromkeys((96, size))))


def torchvision_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield every classification model of torchvision."""
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        if not wanted(name):
            continue
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        try:
            make = functools.partial(models.get_model, name, weights=None, **options)
            count = parameters_of("torchvision", name, make)
        except Exception as error:
            yield Row("torchvision", name, name, "", "", "skipped", short(error))
            continue
        if count > limit:
            yield Row("torchvision", name, name, "", "", "skipped", f"{count / 1e6:.0f} M parameters", count)
            continue

        def build(size: int | None, name: str = name, options: dict[str, Any] = options) -> nn.Module:
            return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]

        yield Model("torchvision", name, name, build, (64, 96, 224, 299))


def smp_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield every decoder with a ResNet-18, and a U-Net with the smallest encoder of each family."""
    smp = importlib.import_module("segmentation_models_pytorch")
    pairs = [(decoder, "resnet18") for decoder in smp.MODEL_ARCHITECTURES_MAPPING if decoder != "dpt"]
    encoders = (
        "resnext50_32x4d dpn68 vgg11_bn se_resnet50 densenet121 inceptionv4 efficientnet-b0 mobilenet_v2 xception "
    )
    encoders += "timm-efficientnet-b0 timm-tf_efficientnet_lite0 timm-skresnet18 mit_b0 mobileone_s0 tu-regnetx_002"
    for decoder, encoder in [*pairs, *(("unet", encoder) for encoder in encoders.split())]:
        name = f"{decoder}-{encoder}"
        if not wanted(name):
            continue

        def build(size: int | None, decoder: str = decoder, encoder: str = encoder) -> nn.Module:
            return smp.create_model(decoder, encoder_name=encoder, encoder_weights=None)  # type: ignore[no-any-return]

        yield Model("smp", name, name, build, (64, 128))


def monai_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield networks for volumes and pictures, with batch normalization where they let one choose."""
    nets = importlib.import_module("monai.networks.nets")
    unet: dict[str, Any] = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
    table: dict[str, tuple[dict[str, Any], int]] = {
        "AHNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "psp_block_num": 0}, 1),
        "AttentionUnet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, **unet}, 1),
        "BasicUNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "norm": "batch"}, 1),
        "BasicUNetPlusPlus": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "norm": "batch"}, 1),
        "DenseNet121": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2}, 1),
        "DynUNet": (
            {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2]}
            | {"upsample_kernel_size": [2] * 3, "norm_name": "batch", "filters": [8, 16, 32, 64]},
            1,
        ),
        "EfficientNetBN": ({"model_name": "efficientnet-b0", "pretrained": False}, 3),
        "FlexibleUNet": (
            {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0", "pretrained": False},
            3,
        ),
        "HighResNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2}, 1),
        "MedNeXtS": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, 1),
        "Quicknat": ({"num_classes": 2, "num_channels": 1}, 1),
        "ResNet": (
            {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [16, 32, 64, 128], "n_input_channels": 1}
            | {"spatial_dims": 3, "num_classes": 2},
            1,
        ),
        "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 2}, 3),
        "SegResNet": ({"spatial_dims": 3, "init_filters": 8, "norm": "batch"}, 1),
        "SegResNetDS": ({"spatial_dims": 3, "init_filters": 8, "norm": "batch"}, 1),
        "SwinUNETR": (
            {"in_channels": 1, "out_channels": 2, "feature_size": 12, "norm_name": "batch", "spatial_dims": 2},
            1,
        ),
        "UNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, **unet, "norm": "batch"}, 1),
        "VNet": ({"spatial_dims": 3}, 1),
        "VoxelMorphUNet": (
            {"spatial_dims": 3, "in_channels": 2, "unet_out_channels": 16, "channels": (16, 32, 32, 32, 32, 32)}
            | {"final_conv_channels": (16, 16)},
            2,
        ),
    }
    for name, (arguments, channels) in table.items():
        if not wanted(name):
            continue
        flat = arguments.get("spatial_dims", 2 if channels == 3 or name == "Quicknat" else 3) == 2

        def build(size: int | None, name: str = name, arguments: dict[str, Any] = arguments) -> nn.Module:
            return getattr(nets, name)(**arguments)  # type: ignore[no-any-return]

        def shape(size: int, channels: int = channels, flat: bool = flat) -> tuple[int, ...]:
            return (channels, *[size] * (2 if flat else 3))

        yield Model("monai", name, name, build, (64, 128) if flat else (16, 32, 64), shape)


def ultralytics_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield the nano model of each generation and task."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    names = (
        "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov9t "
    )
    names += "yolov10n yolo11n yolo11n-seg yolo11n-cls yolo12n yolo26n yolov8-cls-resnet50 rtdetr-resnet50"
    classes = {"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel", "cls": "ClassificationModel"}
    for name in names.split():
        if not wanted(name):
            continue
        task = next((t for t in classes if f"-{t}" in name), "")

        def build(size: int | None, name: str = name, task: str = task) -> nn.Module:
            return getattr(tasks, classes.get(task, "DetectionModel"))(f"{name}.yaml", verbose=False)  # type: ignore[no-any-return]

        yield Model("ultralytics", name, name, build, (96, 320))


def decoder_models(limit: int, wanted: Callable[[str], bool]) -> Iterator[Model | Row]:
    """Yield stand-ins of this project, small, for networks with GroupNorm and SiLU."""
    if wanted("VaeDecoder"):
        yield Model(
            "decoders", "VaeDecoder", "VaeDecoder", lambda size: VaeDecoder(), (8,), lambda size: (4, size, size)
        )
    if wanted("ConditionalUnet1d"):
        yield Model(
            "decoders",
            "ConditionalUnet1d",
            "ConditionalUnet1d",
            lambda size: ConditionalUnet1d(),
            (16,),
            lambda size: (3, size),
        )


MODELS: dict[str, Callable[[int, Callable[[str], bool]], Iterator[Model | Row]]] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "smp": smp_models,
    "monai": monai_models,
    "ultralytics": ultralytics_models,
    "decoders": decoder_models,
}


# -------------------------------------------------------------------------------------------------- the measurements


def short(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def outputs(result: Any) -> list[Tensor]:
    """Return the floating-point tensors of whatever a model returns, as they are in order."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    elif hasattr(result, "__dataclass_fields__"):
        result = vars(result)
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of its tensor; nan counts."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = (a - b).abs().nan_to_num(nan=float("inf")).max() / b.abs().max().clamp_min(1e-12)
            worst = max(worst, float(gap if not torch.equal(a, b) else 0.0))
    return worst


def running_stats(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Yield each layer that has running statistics, with them."""
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            yield module, mean, var


def randomize(model: nn.Module, x: Tensor) -> tuple[set[str], str]:
    """Move statistics and affine maps away from their start, near what the input gives, so that nothing explodes.

    Returns:
        The names of the parameters that get a gradient in a training step, and why there was none.
    """
    momenta = []
    for module, mean, var in running_stats(model):
        momenta.append((module, getattr(module, "momentum", None)))
        module.momentum = 1.0  # type: ignore[assignment]
        for name, spread in (("weight", 0.2), ("bias", 0.1)):
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                start = 1.0 if name == "weight" else 0.0
                parameter.data = start + spread * torch.randn_like(parameter)
        mean.zero_(), var.fill_(1.0)
    model.train()
    why = ""
    try:
        torch.autograd.backward(loss_of(model(x)))
    except Exception as error:
        why = short(error)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for module, momentum in momenta:
        module.momentum = momentum  # type: ignore[assignment]
    for _, mean, var in running_stats(model):
        mean.add_(0.1 * torch.randn_like(mean) * var.clamp_min(0).sqrt()).nan_to_num_(0.0)
        var.mul_(0.8 + 0.4 * torch.rand_like(var)).nan_to_num_(1.0).clamp_min_(1e-3)
    return trained, why


def loss_of(result: Any) -> Tensor:
    """Return a loss that every output takes part in."""
    with_gradient = [t for t in outputs(result) if t.requires_grad]
    if not with_gradient:
        raise RuntimeError("no output depends on a parameter")
    return torch.stack([t.float().square().mean() for t in with_gradient]).sum()


def left_alone(model: nn.Module) -> dict[str, int]:
    """Count the layers that are normalization by the name of their class, hold tensors or are torch's, and not ours."""
    ours = {id(m) for n in model.modules() if isinstance(n, lightning_norm.Normalizer) for m in n.modules()}
    counts: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        like = "norm" in name.lower() or name.lower().startswith("bn")
        holds = bool(list(module.parameters(False)) or list(module.buffers(False)))
        if like and id(module) not in ours and (holds or type(module).__module__.startswith("torch.nn.modules")):
            counts[name] += 1
    return dict(counts.most_common())


def lost_children(before: nn.Module, after: nn.Module) -> list[str]:
    """Return the classes of the children of a layer that the layer in its place has not."""
    has = {type(m) for m in after.modules()}
    return [type(m).__name__ for m in before.children() if not isinstance(m, nn.Identity) and type(m) not in has]


def layer_differences(original: nn.Module, model: nn.Module, report: Any, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """Evaluate the swapped model; return its outputs, and for each preserved layer that differs what is wrong.

    Every swapped layer's input is given to the layer that it replaced too.
    """
    before = dict(original.named_modules(remove_duplicate=False))
    now = dict(model.named_modules(remove_duplicate=False))
    wrong: dict[str, str] = {}
    handles = []
    for row in report.layers:
        old, new = before[row.name], now[row.name]
        if lost := lost_children(old, new):
            wrong[row.name] = f"{row.source} lost {', '.join(lost)}"
        if not row.preserves_eval:
            continue

        def compare(_: nn.Module, args: Any, kwargs: Any, result: Any, row: Any = row, old: nn.Module = old) -> None:
            with torch.no_grad():
                gap = difference(outputs(result), outputs(old(*args, **kwargs)))
            if gap > TOLERANCE:
                wrong[row.name] = f"{wrong.get(row.name, row.source)}, differs by {gap:.1g}"

        handles.append(new.register_forward_hook(compare, with_kwargs=True))
    try:
        result = evaluate(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return result, [f"{name}: {what}" for name, what in wrong.items()]


def compare(
    original: nn.Module, network: nn.Module, report: Any, x: Tensor
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Return the outputs of the swapped and of the original model, and what :func:`layer_differences` finds.

    In float64, where a deep network does not turn rounding into a difference; in float32 where a model has casts.
    """
    before, after = copy.deepcopy(original).double().eval(), copy.deepcopy(network).double()
    try:
        wanted = evaluate(before, x.double())
    except (RuntimeError, TypeError):
        before, after, x = copy.deepcopy(original).eval(), network, x.float()
        wanted = evaluate(before, x)
    result, silent = layer_differences(before, after, report, x.to(next(after.parameters()).dtype))
    return result, wanted, silent


def evaluate(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs in evaluation."""
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        return [t.detach().clone() for t in outputs(model(x))]


def train(model: nn.Module, x: Tensor, report: Any, trained: set[str]) -> str:
    """Take one training step and return what it lacked, "ok" for nothing.

    Layers whose original got no gradient either, as those of unused heads, are not asked for one.
    """
    model.train()
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = loss_of(model(x))
    torch.autograd.backward(loss)
    optimizer.step()
    if not torch.isfinite(loss):
        return f"the loss is {loss.item()}"
    reached = {name.rpartition(".")[0] for name in trained}
    now = dict(model.named_modules(remove_duplicate=False))
    missing, broken = [], []
    for row in report.layers:
        if not reached & {row.name, *row.also}:
            continue
        for name, p in now[row.name].named_parameters():
            if p.grad is None:
                missing.append(f"{row.name}.{name}")
            elif not p.grad.isfinite().all():
                broken.append(f"{row.name}.{name}")
    model.zero_grad(set_to_none=True)
    text = [f"{len(m)} without {what}, first {m[0]}" for m, what in ((missing, "gradient"), (broken, "finite")) if m]
    return "; ".join(text) or "ok"


def undo(report: Any, model: nn.Module, state: dict[str, Tensor], expected: list[Tensor], x: Tensor) -> str:
    """Undo the swap and return what is not bit-identical, "ok" for nothing."""
    report.undo()
    now = model.state_dict()
    if list(now) != list(state):
        return f"names differ, first {next(iter(set(now) ^ set(state)), 'in order')}"
    changed = [n for n, t in state.items() if not torch.equal(t.nan_to_num(), now[n].nan_to_num())]
    if changed:
        return f"{len(changed)} tensors changed, first {changed[0]}"
    same = difference(evaluate(model, x), expected) == 0
    return "ok" if same else "outputs differ"


def export(model: nn.Module, x: Tensor, seconds: int) -> str:
    """Fold a copy of the model, export it, and compare the exported program with the model, as :func:`compare` does."""
    try:
        with time_limit(seconds):
            folded = copy.deepcopy(model).double()
            try:
                expected = evaluate(folded, x.double())
                x = x.double()
            except (RuntimeError, TypeError):
                folded, expected = copy.deepcopy(model), evaluate(model, x)
            lightning_norm.fold(folded, x)
            program = torch.export.export(folded, (x,))
            with torch.no_grad():
                gap = difference(outputs(program.module()(x)), expected)
    except Exception as error:
        return short(error)
    return "ok" if gap < 10 * TOLERANCE else f"differs by {gap:.1g}"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after some seconds of the CPU, and again every five: what runs may catch it.

    It ends an outer limit. A wall clock would count what else the machine does.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s of a CPU")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def prepare(model: Model) -> tuple[nn.Module, Tensor, int, set[str], str]:
    """Build a model that can evaluate the smallest image possible, with statistics away from their start."""
    for size in model.sizes:
        torch.manual_seed(0)
        network = model.build(size)
        x = torch.randn(BATCH, *model.shape(size))
        try:
            trained, why = randomize(network, x)
            if why and size != model.sizes[-1]:
                continue
            evaluate(network, x)
        except TimeoutError:
            raise
        except Exception:
            if size == model.sizes[-1]:
                raise
            continue
        return network, x, size, trained, why
    raise RuntimeError("no size of image works")


def measure(
    network: nn.Module, x: Tensor, trained: set[str], row: Row, no_step: str
) -> tuple[nn.Module | None, list[str]]:
    """Fill a row; ``network`` is left as it was.

    Returns:
        A swapped copy, ``None`` where nothing was swapped, and the classes that the report's hints name.
    """
    source: list[str] | None = None
    if row.source == "hint":
        plan = lightning_norm.swap(network, row.norm, dry_run=True)
        source = ["BatchNorm", *dict.fromkeys(kind for _, kind, _ in plan.skipped)]
    state = {n: t.clone() for n, t in network.state_dict().items()}
    original = copy.deepcopy(network)
    expected = evaluate(network, x)
    report = lightning_norm.swap(network, row.norm, source=source)
    row.candidates, row.swapped = report.candidates, len(report)
    row.left = left_alone(network)
    row.preserved = sum(layer.preserves_eval for layer in report.layers)
    if not report.layers:
        return None, [kind for _, kind, _ in report.skipped]
    result, wanted, row.silent = compare(original, network, report, x)
    if row.preserved == row.swapped:
        row.parity = difference(result, wanted)
        if row.parity > TOLERANCE and not row.silent:
            row.silent = [f"the model differs by {row.parity:.1g}"]
    row.undo = undo(report, network, state, expected, x)
    report = lightning_norm.swap(original, row.norm, source=source)
    try:
        row.step = f"not by the original either: {no_step}" if no_step else train(original, x, report, trained)
    except TimeoutError:
        raise
    except Exception as error:
        row.step = short(error)
    return original, [kind for _, kind, _ in report.skipped]


def sweep(options: argparse.Namespace, done: dict[tuple[str, str, str, str], Row]) -> Iterator[Row]:
    """Yield the rows that are not done yet, those first that took the shortest time before."""
    models: list[Model | Row] = []
    for library in options.libraries:

        def wanted(family: str, library: str = library) -> bool:
            left_out = (library, family, "", "") in done
            finished = all((library, family, norm, "default") in done for norm in options.norms)
            return not (left_out or finished or (options.families and family not in options.families))

        try:
            models += MODELS[library](options.max_parameters, wanted)
        except ImportError as error:
            print(f"{library} is left out: {error}", file=sys.stderr)
    yield from (model for model in models if isinstance(model, Row))
    todo = [model for model in models if isinstance(model, Model)]
    known = {name: row.seconds for name, row in EARLIER.items() if row.seconds}
    todo.sort(key=lambda m: known.get((m.library, m.name), math.inf))
    for model in todo[: options.limit or None]:
        yield from sweep_model(model, options, done)
        gc.collect()


def sweep_model(model: Model, options: argparse.Namespace, done: dict[tuple[str, str, str, str], Row]) -> Iterator[Row]:
    """Yield the rows of one model; with "hint" as the source where the report names classes that were passed over."""
    todo = [n for n in options.norms if (model.library, model.family, n, "default") not in done]
    prepared: tuple[nn.Module, Tensor, int, set[str], str] | None = None
    for norm in todo:
        for source in ("default", "hint"):
            row = Row(model.library, model.family, model.name, norm, source)
            start = time.process_time()
            hints: list[str] = []
            try:
                with time_limit(options.seconds), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    prepared = prepared or prepare(model)
                    network, x, row.size, trained, why = prepared
                    row.parameters = sum(p.numel() for p in network.parameters())
                    swapped, hints = measure(network, x, trained, row, why)
                    if options.export and swapped is not None:
                        row.export = export(swapped, x, options.seconds)
            except Exception as error:
                row.status, row.reason = "error", short(error)
                prepared = None  # it may be half swapped
            row.seconds = round(time.process_time() - start, 2)
            yield row
            if not hints:
                break


# -------------------------------------------------------------------------------------------------------- the tables


COLUMNS = tuple("library family model M px found swapped left preserved silent parity step undo export s".split())  # noqa: SIM905


def read_lines(path: Path) -> dict[tuple[str, str, str, str], Row]:
    """Return the rows of an earlier run; a line that was cut off is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = Row(**json.loads(line))
            rows[row.id] = row
    return rows


def markdown(rows: list[Row]) -> str:
    """Return the table."""
    versions = [f"torch {torch.__version__.split('+')[0]}"]
    for name in ("timm", "torchvision", "segmentation_models_pytorch", "monai", "ultralytics"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    ran = [r for r in rows if r.status == "ok" and r.norm]
    seconds = statistics.median([r.seconds for r in ran] or [0.0])
    lines = [
        "# Models of other libraries",
        "",
        "One model per family (the smallest), random weights, running statistics away from their start, on a CPU. "
        "Written by `python benchmarks/zoo.py`, whose `--help` says what each column is.",
        "",
        summary(rows),
        "",
        "Inputs are two images of the smallest size that the model takes (px; volumes of that edge in monai's models), "
        "for export too. A row may take 300 s of a CPU, and its export as many; what took longer says so.",
        "",
        *told_of_runs(rows),
        f"Versions: {', '.join(versions)}. Median of {seconds:.1f} s per row.",
        "",
    ]
    for norm, source in dict.fromkeys((r.norm, r.source) for r in rows if r.norm):
        part = [r for r in rows if (r.norm, r.source) == (norm, source)]
        how = "" if source == "default" else ", with the classes that the report's hints name as `source`"
        lines += [f"## {norm}{how}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|--:|--:|--:|--:|---|--:|---|--:|---|---|---|--:|"]
        lines += [table_line(r) for r in part]
        lines += [""]
    skipped = [r for r in rows if not r.norm]
    if skipped:
        lines += ["## Left out", "", "| library | family | model | why |", "|---|---|---|---|"]
        lines += [f"| {r.library} | {r.family} | {r.model} | {cell(r.reason)} |" for r in skipped] + [""]
    return "\n".join(lines)


def told_of_runs(rows: list[Row]) -> list[str]:
    """Return what is said of rows of several runs; nothing where all are of one."""
    runs = Counter(row.measured for row in rows if row.norm)
    if len(runs) < 2:
        return []
    counts = ", ".join(f"{n} are of {f'the run {name}' if name else 'an earlier run'}" for name, n in runs.items())
    return [f"Of {sum(runs.values())} rows {counts}. A row without a word under export is of a run without it.", ""]


def cell(text: str) -> str:
    """Return text that a cell of a table can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def table_line(r: Row) -> str:
    """Return a row as a line of the table."""
    if r.status == "error":
        return (
            f"| {r.library} | {r.family} | {r.model} | | | | | | | | | error: {cell(r.reason)} | | | {r.seconds:.0f} |"
        )
    left = ", ".join(f"{n} {kind}" for kind, n in r.left.items())
    silent = f"**{len(r.silent)}**: {r.silent[0]}" if r.silent else "0"
    parity = "" if r.parity is None else f"{r.parity:.0e}"
    values = [r.library, r.family, r.model, f"{r.parameters / 1e6:.1f}", r.size, r.candidates, r.swapped, left]
    values += [r.preserved, silent, parity, r.step, r.undo, r.export, f"{r.seconds:.0f}"]
    return "| " + " | ".join(cell(str(v)) for v in values) + " |"


def summary(rows: list[Row]) -> str:
    """Return the counts in one line per norm."""
    lines = []
    for norm, source in dict.fromkeys((r.norm, r.source) for r in rows if r.norm):
        part = [r for r in rows if (r.norm, r.source) == (norm, source)]
        ok = [r for r in part if r.status == "ok"]
        swapped = [r for r in ok if r.swapped]
        silent = [r for r in ok if r.silent]
        worst = max((r.parity for r in ok if r.parity is not None and not r.silent), default=0.0)
        lines.append(
            f"- {norm} ({source}): {len(part)} models, {sum(r.library == 'timm' for r in part)} timm families; "
            f"{sum(r.candidates for r in ok)} layers found, {sum(r.swapped for r in ok)} swapped in {len(swapped)} "
            "models, "
            f"{sum(sum(r.left.values()) for r in ok)} normalization-like layers left; "
            f"**{sum(len(r.silent) for r in ok)} silent differences** in {len(silent)} models; "
            f"largest parity elsewhere {worst:.0e}; "
            f"step {sum(r.step == 'ok' for r in swapped)}, undo {sum(r.undo == 'ok' for r in swapped)}, "
            f"export {sum(r.export == 'ok' for r in swapped)} of {sum(bool(r.export) for r in swapped)}; "
            f"{len(part) - len(ok)} errors."
        )
    return "\n".join(lines)


EPILOG = """columns
  found       layers that could be swapped
  left        layers that normalize by the name of their class and were left alone
  preserved   layers whose evaluation the report calls the original's
  silent      see above
  parity      relative difference of the outputs in evaluation, where all layers are preserved
  step        one training step: a finite loss, and a gradient for each parameter of each swapped layer that the
              original reaches
  undo        state and outputs bit-identical
  export      torch.export of the folded model gives the same
  s           seconds of a CPU

needs  pip install timm torchvision segmentation-models-pytorch monai ultralytics (a missing one is left out)
"""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("--norms", type=names, default=["sn"], help="keys, as sn,bn (default: sn)")
    parser.add_argument("--libraries", type=names, default=list(LIBRARIES), help=f"of {','.join(LIBRARIES)}")
    parser.add_argument("--families", type=names, default=[], help="only these, as resnet,vgg11_bn (default: all)")
    parser.add_argument("--limit", type=int, default=0, help="at most so many models (default: all)")
    parser.add_argument(
        "--max-parameters", type=float, default=310e6, help="larger models are left out (default: 310e6)"
    )
    parser.add_argument(
        "--seconds", type=int, default=300, help="per model and norm, and as many for its export (default: 300)"
    )
    parser.add_argument("--export", action="store_true", help="fold, torch.export and compare as well")
    parser.add_argument("--lines", type=Path, default=FOLDER / "zoo.jsonl", help="the rows; a run goes on after them")
    parser.add_argument("--markdown", type=Path, default=FOLDER / "zoo.md", help="the table")
    parser.add_argument("--again", default="", metavar="NAME", help="measure all rows anew whose run has another name")
    options = parser.parse_args()
    options.families = set(options.families)
    options.max_parameters = int(options.max_parameters)
    unknown = set(options.libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"--libraries: {sorted(unknown)} unknown, expected some of {','.join(LIBRARIES)}")
    unknown = set(options.norms) - set(lightning_norm.normalizers())
    if unknown:
        parser.error(f"--norms: {sorted(unknown)} unknown, expected some of {','.join(lightning_norm.normalizers())}")
    return options


def main() -> None:
    """Run the sweep and write the table."""
    options = parse()
    os.environ.setdefault("YOLO_VERBOSE", "false")
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_lines(options.lines)
    EARLIER.update({(row.library, row.model): row for row in earlier.values()})
    done = {key: row for key, row in earlier.items() if not options.again or row.measured == options.again}
    for row in sweep(options, done):
        row.measured = options.again
        with options.lines.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        done[row.id] = row
        what = row.reason or f"{row.swapped} of {row.candidates}, {len(row.silent)} silent, step {row.step or '-'}"
        print(
            f"{len(done):4d}  {row.library} {row.family} {row.norm} {row.source}: {what} ({row.seconds} s)", flush=True
        )
    rows = sorted({**earlier, **done}.values(), key=lambda r: (LIBRARIES.index(r.library), r.family))
    options.markdown.write_text(markdown(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
