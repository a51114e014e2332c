"""Lightning callbacks: thin, each hook calls down."""

from lightning_norm.callbacks.monitor.norm_monitor import NormMonitor as NormMonitor
from lightning_norm.callbacks.norm_context import NormContext as NormContext
from lightning_norm.callbacks.norm_freeze import NormFreeze as NormFreeze
from lightning_norm.callbacks.norm_recalibrate import NormRecalibrate as NormRecalibrate
from lightning_norm.callbacks.scheduler.norm_scheduler import NormScheduler as NormScheduler
from lightning_norm.callbacks.swap.manifest_hooks import load_from_checkpoint as load_from_checkpoint
from lightning_norm.callbacks.swap.norm_swap import NormSwap as NormSwap
