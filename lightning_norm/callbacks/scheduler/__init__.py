"""The callback that drives scheduled values."""

from lightning_norm.callbacks.scheduler.norm_scheduler import NormScheduler as NormScheduler
