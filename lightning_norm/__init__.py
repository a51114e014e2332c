"""Normalization layers of papers for PyTorch Lightning: one callback swaps, trains and logs them.

Public names, one explicit line each.
"""

from lightning_norm.callbacks import NormContext as NormContext
from lightning_norm.callbacks import NormMonitor as NormMonitor
from lightning_norm.callbacks import NormRecalibrate as NormRecalibrate
from lightning_norm.callbacks import NormScheduler as NormScheduler
from lightning_norm.callbacks import NormSwap as NormSwap
from lightning_norm.callbacks import load_from_checkpoint as load_from_checkpoint
from lightning_norm.errors import AlreadySwappedError as AlreadySwappedError
from lightning_norm.errors import CheckpointError as CheckpointError
from lightning_norm.errors import CompileWarning as CompileWarning
from lightning_norm.errors import ConflictError as ConflictError
from lightning_norm.errors import ConflictWarning as ConflictWarning
from lightning_norm.errors import MissingDependencyWarning as MissingDependencyWarning
from lightning_norm.errors import NoEffectWarning as NoEffectWarning
from lightning_norm.errors import OptimizerError as OptimizerError
from lightning_norm.errors import ParameterGrowthWarning as ParameterGrowthWarning
from lightning_norm.errors import SyncError as SyncError
from lightning_norm.errors import SyncWarning as SyncWarning
from lightning_norm.metrics import FeatureCondensation as FeatureCondensation
from lightning_norm.normalizers import BNET as BNET
from lightning_norm.normalizers import AdaptiveFusionNorm as AdaptiveFusionNorm
from lightning_norm.normalizers import ASRNorm as ASRNorm
from lightning_norm.normalizers import BatchChannelNorm as BatchChannelNorm
from lightning_norm.normalizers import BatchNorm as BatchNorm
from lightning_norm.normalizers import ContextNorm as ContextNorm
from lightning_norm.normalizers import DiminishingBatchNorm as DiminishingBatchNorm
from lightning_norm.normalizers import GroupNorm as GroupNorm
from lightning_norm.normalizers import InstanceNorm as InstanceNorm
from lightning_norm.normalizers import LayerNorm as LayerNorm
from lightning_norm.normalizers import MomentNorm as MomentNorm
from lightning_norm.normalizers import Normalizer as Normalizer
from lightning_norm.normalizers import Paper as Paper
from lightning_norm.normalizers import RepresentativeBatchNorm as RepresentativeBatchNorm
from lightning_norm.normalizers import Scheduled as Scheduled
from lightning_norm.normalizers import SwitchableNorm as SwitchableNorm
from lightning_norm.normalizers import UnifiedBatchNorm as UnifiedBatchNorm
from lightning_norm.normalizers import contexts as contexts
from lightning_norm.normalizers import create as create
from lightning_norm.normalizers import fit_contexts as fit_contexts
from lightning_norm.normalizers import normalizers as normalizers
from lightning_norm.ops.moments import Affine as Affine
from lightning_norm.ops.moments import Moments as Moments
from lightning_norm.ops.normalize import normalize as normalize
from lightning_norm.plugins import NormSync as NormSync
from lightning_norm.schedules.base import Schedule as Schedule
from lightning_norm.schedules.composed import Chain as Chain
from lightning_norm.schedules.composed import Warmup as Warmup
from lightning_norm.schedules.curves import Constant as Constant
from lightning_norm.schedules.curves import Cosine as Cosine
from lightning_norm.schedules.curves import Exponential as Exponential
from lightning_norm.schedules.curves import InversePower as InversePower
from lightning_norm.schedules.curves import Linear as Linear
from lightning_norm.schedules.curves import Steps as Steps
from lightning_norm.surgery.deploy import DeployReport as DeployReport
from lightning_norm.surgery.deploy import fold as fold
from lightning_norm.surgery.deploy import to_plain as to_plain
from lightning_norm.surgery.param_groups import no_weight_decay as no_weight_decay
from lightning_norm.surgery.param_groups import norm_param_groups as norm_param_groups
from lightning_norm.surgery.recalibrate import Recalibration as Recalibration
from lightning_norm.surgery.recalibrate import recalibrate as recalibrate
from lightning_norm.surgery.report import SwapReport as SwapReport
from lightning_norm.surgery.swap import swap as swap

__version__ = "0.1.0"
