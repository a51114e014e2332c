"""The callback that logs what the layers learn."""

from lightning_norm.callbacks.monitor.norm_monitor import NormMonitor as NormMonitor
