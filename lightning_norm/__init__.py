"""Normalization layers of papers for PyTorch Lightning: one callback swaps, trains and logs them.

A public name is imported when it is first used, so that ``import lightning_norm`` costs nothing and a program without
Lightning, Triton or a GPU never meets them. Type checkers read the same names from ``__init__.pyi``, which
``python docs/generate.py`` writes.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

# generated: methods, by docs/generate.py
_METHODS: tuple[str, ...] = (
    "ASRNorm",
    "AdaptiveFusionNorm",
    "BNET",
    "BatchChannelNorm",
    "BatchNorm",
    "BatchRenorm",
    "ContextNorm",
    "DiminishingBatchNorm",
    "DynamicErf",
    "DynamicTanh",
    "FilterResponseNorm",
    "GroupNorm",
    "IBN",
    "InstanceNorm",
    "LayerNorm",
    "RepresentativeBatchNorm",
    "SwitchableNorm",
    "UnifiedBatchNorm",
)
# end of generated

_PUBLIC = {
    "callbacks": (
        *("NormContext", "NormFreeze", "NormMonitor", "NormRecalibrate", "NormScheduler", "NormSwap"),
        "load_from_checkpoint",
    ),
    "errors": (
        "AlreadySwappedError",
        "BackendWarning",
        "CheckpointError",
        "CompileWarning",
        "ConflictError",
        "ConflictWarning",
        "KernelError",
        "LeftAloneWarning",
        "MaskError",
        "MissingDependencyWarning",
        "NoEffectWarning",
        "NotReachedWarning",
        "OptimizerError",
        "OtherFileWarning",
        "QuantizationError",
        "ParameterGrowthWarning",
        "SyncError",
        "SyncWarning",
        "UnsuitableNormWarning",
        "WeightDecayWarning",
        "WriteError",
    ),
    "layers.choice": ("Choice",),
    "metrics": ("FeatureCondensation",),
    "normalizers": (
        *_METHODS,
        *("MomentNorm", "Normalizer", "Paper", "Scheduled"),
        *("contexts", "create", "fit_contexts", "normalizers"),
    ),
    "ops.moments": ("Affine", "Moments"),
    "ops.normalize": ("normalize",),
    "plugins": ("NormSync",),
    "schedules.base": ("Schedule",),
    "schedules.composed": ("Chain", "Warmup"),
    "schedules.curves": ("Constant", "Cosine", "Exponential", "InversePower", "Linear", "Staircase", "Steps"),
    "surgery.deploy": ("DeployReport", "fold", "to_plain"),
    "surgery.quantize": ("quantize",),
    "surgery.harden": ("HardenReport", "harden"),
    "surgery.load_published": ("load_published",),
    "surgery.masks": ("masks",),
    "surgery.norm_statistics": ("NormStatistics", "norm_statistics"),
    "surgery.pause": ("paused_statistics",),
    "surgery.pool": ("pool_statistics",),
    "surgery.param_groups": ("no_weight_decay", "norm_param_groups"),
    "surgery.recognize": ("is_norm", "norm_types"),
    "surgery.recalibrate": ("Recalibration", "recalibrate"),
    "surgery.report": ("SwapReport",),
    "surgery.swap": ("swap",),
    "surgery.warm_up": ("warm_up",),
}
"""Module of this package -> the public names that are imported from it."""

_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    # ``normalizers`` is a function and a folder. Importing the folder has already set the attribute to its module,
    # which can be called like the function. To overwrite it would make its meaning depend on the order of imports.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
