"""One file per method; a new one needs its line here."""

import importlib
import sys
import types
from typing import Any

from lightning_norm.layers.base import MomentNorm as MomentNorm
from lightning_norm.layers.base import Normalizer as Normalizer
from lightning_norm.layers.base import Paper as Paper
from lightning_norm.layers.registry import create as create
from lightning_norm.layers.registry import normalizers as normalizers
from lightning_norm.layers.registry import resolve as resolve
from lightning_norm.layers.scheduled import Scheduled as Scheduled
from lightning_norm.normalizers.adaptive_fusion_norm import AdaptiveFusionNorm as AdaptiveFusionNorm
from lightning_norm.normalizers.asr_norm import ASRNorm as ASRNorm
from lightning_norm.normalizers.batch_channel_norm import BatchChannelNorm as BatchChannelNorm
from lightning_norm.normalizers.batch_norm import BatchNorm as BatchNorm
from lightning_norm.normalizers.batch_renorm import BatchRenorm as BatchRenorm
from lightning_norm.normalizers.bnet import BNET as BNET
from lightning_norm.normalizers.context.assignment import contexts as contexts
from lightning_norm.normalizers.context.assignment import fit_contexts as fit_contexts
from lightning_norm.normalizers.context.context_norm import ContextNorm as ContextNorm
from lightning_norm.normalizers.diminishing_batch_norm import DiminishingBatchNorm as DiminishingBatchNorm
from lightning_norm.normalizers.dynamic_erf import DynamicErf as DynamicErf
from lightning_norm.normalizers.dynamic_tanh import DynamicTanh as DynamicTanh
from lightning_norm.normalizers.filter_response_norm import FilterResponseNorm as FilterResponseNorm
from lightning_norm.normalizers.group_norm import GroupNorm as GroupNorm
from lightning_norm.normalizers.group_norm import LayerNorm as LayerNorm
from lightning_norm.normalizers.ibn import IBN as IBN
from lightning_norm.normalizers.instance_norm import InstanceNorm as InstanceNorm
from lightning_norm.normalizers.representative_batch_norm import RepresentativeBatchNorm as RepresentativeBatchNorm
from lightning_norm.normalizers.switchable_norm import SwitchableNorm as SwitchableNorm
from lightning_norm.normalizers.unified_batch_norm import UnifiedBatchNorm as UnifiedBatchNorm


class _CallableModule(types.ModuleType):
    """This folder as ``lightning_norm.normalizers``: a module, and callable like the public function of that name.

    Python sets an attribute of a package to a submodule of that name whenever the submodule is imported first, so the
    function alone would be there or not depending on the order of imports.
    """

    def __call__(self) -> dict[str, type[Normalizer]]:
        """Return every registered normalizer by its key, the oldest method first."""
        return normalizers()

    def __reduce__(self) -> tuple[Any, ...]:
        # A plain module cannot be pickled, and a function can.
        return importlib.import_module, (self.__name__,)


# Python allows another class for a module that is there, and has no other way to make one callable.
sys.modules[__name__].__class__ = _CallableModule
