"""Normalization layers of papers for PyTorch Lightning: one callback swaps, trains and logs them.

Public names, one explicit line each.
"""

from lightning_norm.callbacks import NormMonitor as NormMonitor
from lightning_norm.callbacks import NormRecalibrate as NormRecalibrate
from lightning_norm.callbacks import NormSwap as NormSwap
from lightning_norm.callbacks import load_from_checkpoint as load_from_checkpoint
from lightning_norm.errors import AlreadySwappedError as AlreadySwappedError
from lightning_norm.errors import CheckpointError as CheckpointError
from lightning_norm.errors import CompileWarning as CompileWarning
from lightning_norm.errors import NoEffectWarning as NoEffectWarning
from lightning_norm.errors import OptimizerError as OptimizerError
from lightning_norm.normalizers import BatchChannelNorm as BatchChannelNorm
from lightning_norm.normalizers import BatchNorm as BatchNorm
from lightning_norm.normalizers import GroupNorm as GroupNorm
from lightning_norm.normalizers import InstanceNorm as InstanceNorm
from lightning_norm.normalizers import LayerNorm as LayerNorm
from lightning_norm.normalizers import MomentNorm as MomentNorm
from lightning_norm.normalizers import Normalizer as Normalizer
from lightning_norm.normalizers import Paper as Paper
from lightning_norm.normalizers import Scheduled as Scheduled
from lightning_norm.normalizers import SwitchableNorm as SwitchableNorm
from lightning_norm.normalizers import create as create
from lightning_norm.normalizers import normalizers as normalizers
from lightning_norm.ops.fused import normalize as normalize
from lightning_norm.ops.moments import Affine as Affine
from lightning_norm.ops.moments import Moments as Moments
from lightning_norm.surgery.deploy import DeployReport as DeployReport
from lightning_norm.surgery.deploy import fold as fold
from lightning_norm.surgery.deploy import to_plain as to_plain
from lightning_norm.surgery.recalibrate import Recalibration as Recalibration
from lightning_norm.surgery.recalibrate import recalibrate as recalibrate
from lightning_norm.surgery.report import SwapReport as SwapReport
from lightning_norm.surgery.swap import swap as swap

__version__ = "0.1.0"
