"""Lightning callbacks: thin, each hook calls down."""

from lightning_norm.callbacks.checkpoint import load_from_checkpoint as load_from_checkpoint
from lightning_norm.callbacks.context import NormContext as NormContext
from lightning_norm.callbacks.monitor import NormMonitor as NormMonitor
from lightning_norm.callbacks.recalibrate import NormRecalibrate as NormRecalibrate
from lightning_norm.callbacks.scheduler import NormScheduler as NormScheduler
from lightning_norm.callbacks.swap import NormSwap as NormSwap
