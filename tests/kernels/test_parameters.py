"""How many parameters the device functions have: more than 20 cannot be read, and fewer functions may have them."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

import lightning_norm.kernels

MOST = 20
LONGER = {
    "depthwise.backward.depthwise_combine": 22,
    "depthwise.backward.depthwise_sums": 24,
    "depthwise.forward.depthwise_apply": 21,
    "encoder_decoder.backward.vjp_affine": 32,
    "encoder_decoder.backward.vjp_encode": 34,
    "encoder_decoder.backward.vjp_encoder": 22,
    "encoder_decoder.backward.vjp_statistics": 26,
    "encoder_decoder.forward.decode": 44,
    "encoder_decoder.forward.encode": 34,
    "mixture.backward.adjoint": 21,
    "mixture.backward.adjoint_at": 33,
    "mixture.backward.vjp_columns": 40,
    "mixture.backward.vjp_mix": 40,
    "mixture.backward.vjp_mix_at": 38,
    "mixture.backward.vjp_pool": 42,
    "mixture.backward.vjp_rows": 34,
    "mixture.forward.mix": 44,
    "mixture.forward.mix_at": 39,
    "mixture.forward.pool": 22,
    "owner.backward.own_channels_vjp": 56,
    "owner.backward.own_mixture_vjp": 37,
    "owner.backward.spread": 21,
    "owner.forward.own_channels": 63,
    "owner.forward.own_mixture": 36,
    "passes.backward.combine_columns": 21,
    "per_channel.backward.channels_vjp": 56,
    "per_channel.backward.parts_at": 38,
    "per_channel.forward.batch_of": 23,
    "per_channel.forward.channels_of": 71,
    "per_channel.running_stats.commit": 21,
    "per_channel.running_stats.move": 24,
    "per_channel.running_stats.survey": 31,
}
"""What has more of them today, compile-time ones included: no other function may, and none of these more."""


def parameters():
    package = lightning_norm.kernels
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if isinstance(function, JITFunction) and function.fn.__module__ == module.name:
                yield f"{module.name.removeprefix(package.__name__ + '.')}.{name}", len(function.params)


def test_no_more_parameters():
    assert {name: n for name, n in parameters() if n > MOST} == LONGER
