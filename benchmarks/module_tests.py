"""Run the checks of torch's own module tests over every normalizer, and over torch's norms for comparison.

    python benchmarks/module_tests.py --norms bn,sn --kinds gradcheck,pickle --verbose

torch describes its modules by ``ModuleInfo`` entries in torch.testing._internal.common_modules, and checks them in a
test file that is no part of the wheel. The entries here are built like those of torch's BatchNorm and GroupNorm, the
checks are written anew after those of that file. Needs expecttest, which torch's testing code imports.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import io
import json
import pickle
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_norm
from lightning_norm.layers.base import Normalizer
from lightning_norm.ops.layout import at_least_float32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
PROMISES = {
    "scheduled values": "0-dim and float64 in every module, so that momentum 0.1 means 0.1 for float64 inputs too",
    "running statistics": "float32 at least, whatever the module is cast to: a bfloat16 average would stop moving",
}
"""Buffers whose width is a promise, and why; all others must take the module's dtype."""
ALLOWED: dict[tuple[str, str], str] = {}
"""(key, kind) -> why these failures are right; ``--check`` does not count them."""


def promised(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter or buffer of a module in ``dtype`` is to have."""
    if not isinstance(module, Normalizer):
        return dtype
    if name.removeprefix("_") in module.ranges:
        return torch.float64
    if name.removeprefix("_no_") in module.ranges:
        return module.get_buffer(name).dtype  # a stand-in for a value that is None, which nobody reads
    return at_least_float32(dtype) if name in (*module.running_names, *module.extra_buffers.float32) else dtype


class CheckError(AssertionError):
    """A check that found something else than torch's modules do."""


def need(condition: bool, text: str) -> None:
    """Raise a CheckError with the text unless the condition holds."""
    if not condition:
        raise CheckError(text)


# ------------------------------------------------------------------------------------------------------- the entries


def arguments(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments without which a normalizer cannot be built, or does nothing."""
    return {**getattr(cls, "test_arguments", {}), **({"context": "gate"} if getattr(cls, "key", "") == "cn" else {})}


def refuses_rows(cls: type[nn.Module]) -> bool:
    """Tell whether inputs (N, C) give a statistic of one value; torch's InstanceNorm has no such entry either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not issubclass(cls, Normalizer):
            return False
        layer: Any = cls(6, **arguments(cls))
        return bool(layer.statistic_size(4, 1) < 2)


def cases(common: Any, cls: type[nn.Module]) -> Callable[..., list[Any]]:
    """Return the function that gives a normalizer's inputs to its ModuleInfo.

    Channels, shapes and options are those of torch's entries for BatchNorm1d to 3d, GroupNorm and InstanceNorm.
    """
    shapes: dict[str, tuple[int, ...]] = {"2d_input": (4, 6), "3d_input": (4, 6, 5), "4d": (2, 6, 6, 6)}
    shapes |= {"5d": (2, 6, 4, 4, 4)}
    options: dict[str, dict[str, Any]] = {"": {}, "simple_average": {"eps": 1e-3, "momentum": None}}
    options |= {"momentum": {"eps": 1e-3, "momentum": 0.8}, "not_affine": {"eps": 1e-3, "affine": False}}
    options |= {"not_tracking_stats": {"eps": 1e-3, "track_running_stats": False}, "affine_not_bias": {"bias": False}}
    table = [(f"{shape}{'_' * bool(o)}{o}", shapes[shape], options[o]) for shape in shapes for o in options]
    if refuses_rows(cls):
        table = [row for row in table if not row[0].startswith("2d_input")]
    table += [("zero_batch", (0, 6, 2, 2), {}), ("tokens", (2, 5, 6), {"channel_dim": -1})]
    always = arguments(cls)

    def inputs(module_info: Any, device: Any, dtype: Any, requires_grad: bool, training: bool, **_: Any) -> list[Any]:
        results = []
        for desc, shape, more in table:
            x = torch.testing.make_tensor(shape, device=device, dtype=dtype, requires_grad=requires_grad)
            call = common.FunctionInput(6, **{**always, **more})
            results.append(common.ModuleInput(call, common.FunctionInput(x), desc=desc))
        return results

    return inputs


def takes(cls: type[nn.Module], call: Any) -> bool:
    """Tell whether the class can be built with these arguments: not each has a momentum or a bias of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls(*call.args, **call.kwargs)
        except (TypeError, ValueError):
            return False
    return True


def entries(common: Any, keys: list[str]) -> dict[str, Any]:
    """Return name -> ModuleInfo of the normalizers, and of torch's norms where "torch" is among the keys."""
    results: dict[str, Any] = {}
    for key in keys:
        if key == "torch":
            of_torch = [info for info in common.module_db if info.module_cls in TORCH_NORMS]
            results |= {f"torch.{info.module_cls.__name__}": info for info in of_torch}
        else:
            cls = lightning_norm.normalizers()[key]
            results[key] = common.ModuleInfo(cls, module_inputs_func=cases(common, cls))
    return results


# -------------------------------------------------------------------------------------------------------- the checks


class Case:
    """One entry's arguments and input, in training or evaluation."""

    def __init__(self, info: Any, module_input: Any, dtype: torch.dtype, training: bool) -> None:
        self.info, self.module_input, self.dtype, self.training = info, module_input, dtype, training

    def module(self, **more: Any) -> Any:
        """Return the module, built with ``device`` and ``dtype`` unless others are given."""
        call = self.module_input.constructor_input
        options = {"device": DEVICE, "dtype": self.dtype} | more
        built = self.info.module_cls(*call.args, **{**call.kwargs, **options})
        return built.train(self.training)

    @property
    def x(self) -> Tensor:
        """The input."""
        x: Tensor = self.module_input.forward_input.args[0]
        return x.detach().clone().requires_grad_(x.requires_grad)

    def inputs(self) -> tuple[Any, ...]:
        """Return a module and an input for it."""
        return self.module(), self.x


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point parameters and buffers; torch's own module has no others."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return {name: t for name, t in every if t.is_floating_point()}


def like(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Check that every floating-point tensor of the module has a device and a dtype."""
    for name, t in tensors(module).items():
        need(t.device.type == device, f"{name} on {t.device}, expected {device}")
        wanted = promised(module, name, dtype)
        wider = wanted != dtype and t.dtype == torch.float64  # a cast to half leaves a float64 statistic as it is
        need(t.dtype == wanted or wider, f"{name} is {t.dtype}, expected {wanted}")


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Check that two results are equal up to rounding."""
    need(a.shape == b.shape and a.dtype == b.dtype, f"{what}: {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}")
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-4}.get(a.dtype, 2e-2)
    gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    need(gap <= tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0), f"{what} differs by {gap:.2g}")


def check_forward(case: Case) -> None:
    """The output has the input's shape and dtype, and depends on nothing but the input."""
    module, x = case.inputs()
    y = copy.deepcopy(module)(x)
    need(y.shape == x.shape and y.dtype == x.dtype, f"output {tuple(y.shape)} {y.dtype} of {tuple(x.shape)} {x.dtype}")
    same(copy.deepcopy(module)(x), y, "a second call")


def check_backward(case: Case) -> None:
    """Input and parameters get gradients of their shape."""
    module, x = case.module(), case.x.requires_grad_()
    module(x).sum().backward()
    for name, t in (("input", x), *module.named_parameters()):
        need(t.grad is not None and t.grad.shape == t.shape, f"{name} has no gradient")


def check_factory_kwargs(case: Case) -> None:
    """``device`` and ``dtype`` reach every parameter and floating-point buffer; so does a device context."""
    like(case.module(), DEVICE, case.dtype)
    like(case.module(device="meta"), "meta", case.dtype)
    with torch.device("meta"):
        module = case.info.module_cls(
            *case.module_input.constructor_input.args, **case.module_input.constructor_input.kwargs
        )
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        need(t.is_meta, f"{name} on {t.device} under torch.device('meta')")


def check_skip_init(case: Case) -> None:
    """``torch.nn.utils.skip_init`` builds the module."""
    call = case.module_input.constructor_input
    skip_init: Callable[..., nn.Module] = torch.nn.utils.skip_init
    module = skip_init(case.info.module_cls, *call.args, device=DEVICE, dtype=case.dtype, **call.kwargs)
    like(module, DEVICE, case.dtype)


def check_to_empty(case: Case) -> None:
    """``to_empty`` takes a module from the meta device."""
    module = case.module(device="meta")
    module.to_empty(device=DEVICE)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        need(not t.is_meta, f"{name} stays on the meta device")


def check_dtype_move(case: Case) -> None:
    """``to(dtype)`` moves every parameter and floating-point buffer, there and back."""
    for dtype in (torch.float64, torch.float32):
        module, x = case.module().to(dtype), case.x.to(dtype)
        like(module, DEVICE, dtype)
        need(module(x).dtype == dtype, "the output does not follow")


def check_half(case: Case) -> None:
    """``half()`` and ``bfloat16()`` move every floating-point tensor, and the module runs."""
    for dtype in (torch.float16, torch.bfloat16):
        module, x = case.module().to(dtype), case.x.to(dtype)
        need(module(x).dtype == dtype, f"the output is not {dtype}")
        like(module, DEVICE, dtype)


def check_pickle(case: Case) -> None:
    """A pickled module, and one saved by torch, gives the same output."""
    module, x = case.inputs()
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    y = copy.deepcopy(module)(x)
    same(other(x), y, "pickle")
    same(saved(x), y, "torch.save")


def check_state_dict(case: Case) -> None:
    """A state loads into a new module, by copy and by assignment, and gives the same output."""
    module, x = case.inputs()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.rand_like(p))
    for assign in (False, True):
        other = case.module(device="meta") if assign else case.module()
        other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
        same(other(x), copy.deepcopy(module)(x), f"load_state_dict(assign={assign})")


def check_repr(case: Case) -> None:
    """``repr`` and ``str`` work, and name the class."""
    module = case.module()
    need(type(module).__name__ in repr(module) and bool(str(module)), "the class is not named")


def check_non_contiguous(case: Case) -> None:
    """A non-contiguous input gives the same output and gradients."""
    module, x = case.module(), case.x
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    other = wide[..., ::2]
    with torch.no_grad():
        other.copy_(x)
    results = []
    for value in (x.detach(), other):
        twin, leaf = copy.deepcopy(module), value.detach().requires_grad_()
        y = twin(leaf)
        (y * y).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in twin.parameters())])
    for one, two in zip(*results, strict=True):
        same(two.contiguous(), one.contiguous(), "non-contiguous")


def check_memory_format(case: Case) -> None:
    """Channels last gives the same output, with the module moved to it or not."""
    module, x = case.inputs()
    if x.dim() not in (4, 5) or 0 in x.shape:
        return
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    y = copy.deepcopy(module)(x)
    for moved in (False, True):
        twin = copy.deepcopy(module)
        if moved and any(p.dim() in (4, 5) and p.dim() != x.dim() for p in twin.parameters()):
            continue  # a kernel of 4 dimensions, which torch cannot move to a format of 5
        twin = twin.to(memory_format=last) if moved else twin
        out = twin(x.to(memory_format=last))
        same(out, y, "channels last")


def check_train_eval(case: Case) -> None:
    """``train()`` and ``eval()`` set the flag, on every child too."""
    module = case.module()
    for mode in (True, False):
        module.train(mode)
        need(all(m.training is mode for m in module.modules()), f"a child stays at training={not mode}")


def check_deepcopy(case: Case) -> None:
    """A copy shares nothing."""
    module = case.module()
    other = tensors(copy.deepcopy(module))
    for name, t in tensors(module).items():
        need(t.numel() == 0 or t.data_ptr() != other[name].data_ptr(), f"{name} is shared")


def check_share_memory(case: Case) -> None:
    """``share_memory()`` reaches every tensor."""
    module = case.module()
    module.share_memory()
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        need(t.is_shared(), f"{name} is not shared")


def differentiate(case: Case, check: Callable[..., bool], **options: Any) -> None:
    """Run gradcheck or gradgradcheck of the input and all parameters, in double, as torch's module tests do."""
    module, x = case.module(), case.x.requires_grad_()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True)) | {name: b.clone() for name, b in buffers.items()}
        y: Tensor = torch.func.functional_call(module, state, (x,))
        return y

    need(check(function, (x, *parameters.values()), **options), "gradients differ")


def check_gradcheck(case: Case) -> None:
    """First derivatives, in fast mode as everywhere in torch's tests."""
    differentiate(case, torch.autograd.gradcheck, check_batched_grad=False, fast_mode=True)


def check_gradcheck_batched(case: Case) -> None:
    """First derivatives with batched gradients, as torch's own tests run gradcheck."""
    differentiate(case, torch.autograd.gradcheck, check_batched_grad=True, fast_mode=True)


def check_gradcheck_forward(case: Case) -> None:
    """Forward-mode derivatives."""
    differentiate(case, torch.autograd.gradcheck, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


def check_gradgradcheck(case: Case) -> None:
    """Second derivatives."""
    differentiate(case, torch.autograd.gradgradcheck, check_batched_grad=False, fast_mode=True)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
IN_DOUBLE = {name for name in CHECKS if name.startswith("grad")}
ONCE = {"repr", "train_eval", "factory_kwargs", "skip_init", "to_empty", "deepcopy", "share_memory"}
"""Independent of the mode."""


def run(info: Any, kind: str, common: Any) -> list[str]:
    """Return what one check finds wrong with one module, and the number of cases."""
    check, failures, count = CHECKS[kind], [], 0
    for training in (True,) if kind in ONCE else (True, False):
        for dtype in (torch.float64,) if kind in IN_DOUBLE else (torch.float32, torch.float64):
            torch.manual_seed(0)
            more = {"device": DEVICE, "dtype": dtype, "requires_grad": False, "training": training}
            for case_input in info.module_inputs_func(info, **more):
                if not takes(info.module_cls, case_input.constructor_input):
                    continue
                count += 1
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        check(Case(info, case_input, dtype, training))
                except Exception as error:
                    text = " ".join(str(error).split())[:140]
                    mode = "train" if training else "eval"
                    failures.append(f"{case_input.desc} {mode} {str(dtype)[6:]}: {type(error).__name__}: {text}")
    return [str(count), *failures]


def table(rows: dict[str, dict[str, list[str]]], kinds: list[str]) -> str:
    """Return the counts of failures as a markdown table."""
    lines = ["| | " + " | ".join(kinds) + " | failures | of |", "|---" * (len(kinds) + 3) + "|"]
    for name, row in rows.items():
        counts = [len(row[kind]) - 1 for kind in kinds]
        total = sum(int(row[kind][0]) for kind in kinds)
        lines.append(f"| {name} | " + " | ".join(str(c or "") for c in counts) + f" | {sum(counts)} | {total} |")
    return "\n".join(lines)


def report(rows: dict[str, dict[str, list[str]]], kinds: list[str]) -> str:
    """Return the table, what it adds up to, and what does not count in it."""
    ours = {name: row for name, row in rows.items() if not name.startswith("torch.")}
    counts = Counter({kind: sum(len(row[kind]) - 1 for row in ours.values()) for kind in kinds})
    most = ", ".join(f"{kind} {n}" for kind, n in counts.most_common() if n)
    lines = [table(rows, kinds), "", f"{counts.total()} failures of {len(ours)} normalizers: {most or 'none'}.", ""]
    lines += [f"- Not counted: {what}: {reason}." for what, reason in PROMISES.items()]
    lines += [f"- Allowed: {name}, {kind}: {reason}." for (name, kind), reason in ALLOWED.items()]
    refuse = ", ".join(name for name in ours if refuses_rows(lightning_norm.normalizers()[name]))
    if refuse:
        lines += [f"- Not run: inputs (N, C) for {refuse}, which refuse them: a statistic of a sample has one value."]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Return the options."""
    what = "\n".join(f"  {name:<18}{(inspect.getdoc(check) or '').splitlines()[0]}" for name, check in CHECKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"kinds:\n{what}", formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    every = [*lightning_norm.normalizers(), "torch"]
    parser.add_argument("--norms", type=names, default=every, help="keys, and torch for its own norms (default: all)")
    parser.add_argument("--kinds", type=names, default=list(CHECKS), help="of the kinds below (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print each failure")
    parser.add_argument("--json", type=Path, help="write all failures to this file, beside those of other norms in it")
    parser.add_argument("--markdown", type=Path, help="write the table of all norms in the --json file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a failure is not allowed")
    options = parser.parse_args()
    for label, chosen, known in (("norms", options.norms, every), ("kinds", options.kinds, list(CHECKS))):
        if unknown := set(chosen) - set(known):
            parser.error(f"--{label}: {sorted(unknown)} unknown, expected some of {','.join(known)}")
    return options


def main() -> None:
    """Run the checks and print the counts."""
    options = parse()
    torch.set_num_threads(1)
    try:
        from torch.testing._internal import common_modules as common
    except ImportError as error:
        sys.exit(f"torch's module tests cannot be imported: {error}. Type pip install expecttest.")
    rows: dict[str, dict[str, list[str]]] = {}
    for name, info in entries(common, options.norms).items():
        start = time.perf_counter()
        rows[name] = {kind: run(info, kind, common) for kind in options.kinds}
        bad = sum(len(results) - 1 for results in rows[name].values())
        print(f"{name}: {bad} failures ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        if options.verbose:
            for kind, results in rows[name].items():
                print("\n".join(f"  {kind} {text}" for text in results[1:]), end="\n" * (len(results) > 1))
    if options.json and options.json.exists():
        rows = {**json.loads(options.json.read_text()), **rows}
    order = [*lightning_norm.normalizers()]
    rows = {n: rows[n] for n in sorted(rows, key=lambda n: (order.index(n) if n in order else len(order), n))}
    text = report(rows, options.kinds)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.markdown:
        version = torch.__version__.partition("+")[0]
        how = f"Failures of the checks, by `python benchmarks/module_tests.py`; torch {version}."
        options.markdown.write_text(f"# torch's own module tests\n\n{how}\n\n{text}\n")
    ours = {name: row for name, row in rows.items() if not name.startswith("torch.")}
    failed = ((n, k) for n, row in ours.items() for k, results in row.items() if len(results) > 1)
    wrong = [each for each in failed if each not in ALLOWED]
    if options.check and wrong:
        sys.exit(f"not allowed: {wrong}")


if __name__ == "__main__":
    main()
