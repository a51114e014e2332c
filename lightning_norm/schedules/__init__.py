"""Schedules: hyper-parameters as pure functions of the epoch or the step."""

from lightning_norm.schedules.base import Schedule as Schedule
from lightning_norm.schedules.composed import Chain as Chain
from lightning_norm.schedules.composed import Warmup as Warmup
from lightning_norm.schedules.composed import as_schedule as as_schedule
from lightning_norm.schedules.curves import Constant as Constant
from lightning_norm.schedules.curves import Cosine as Cosine
from lightning_norm.schedules.curves import Exponential as Exponential
from lightning_norm.schedules.curves import InversePower as InversePower
from lightning_norm.schedules.curves import Linear as Linear
from lightning_norm.schedules.curves import Steps as Steps
