"""Small networks with GroupNorm and SiLU for the zoo, built as those of diffusers and diffusion-policy are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two convolutions behind GroupNorm and one SiLU module that both norms share, as in diffusers' ResnetBlock2D.

    Args:
        inputs: channels that come.
        outputs: channels that go.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs, eps=1e-6), nn.GroupNorm(8, outputs, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nonlinearity, self.dropout = nn.SiLU(), nn.Dropout(0.0)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        y = self.conv1(self.nonlinearity(self.norm1(x)))
        y = self.conv2(self.dropout(self.nonlinearity(self.norm2(y))))
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        z: Tensor = y + shortcut
        return z


class VaeDecoder(nn.Module):
    """The decoder of a VAE: blocks, each with upsampling behind it, then GroupNorm, SiLU and a convolution.

    Args:
        widths: channels of each resolution, the coarsest first.
        latents: channels of the input.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 16), latents: int = 4) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latents, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(ResnetBlock(before, width) for before, width in pairs)
        self.conv_norm_out, self.conv_act = nn.GroupNorm(8, widths[-1], eps=1e-6), nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures, twice as large behind each block."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = nn.functional.interpolate(block(x), scale_factor=2.0)
        y: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return y


class ConvBlock(nn.Sequential):
    """Convolution, GroupNorm and activation in a row, as in diffusion-policy, whose Mish is a SiLU here.

    Args:
        inputs: channels that come.
        outputs: channels that go.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.SiLU())


class ConditionalUnet1d(nn.Module):
    """A U-Net over time, whose blocks are conditioned by scale and bias between their two convolutions.

    Args:
        widths: channels of each resolution, the finest first.
        actions: channels of the input.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32), actions: int = 3) -> None:
        super().__init__()
        steps = list(zip((actions, *widths), widths, strict=False))
        self.first = nn.ModuleList(ConvBlock(a, b) for a, b in steps)
        self.second = nn.ModuleList(ConvBlock(b, b) for _, b in steps)
        self.condition = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(actions, 2 * b)) for _, b in steps)
        self.up = nn.ModuleList(ConvBlock(2 * b, a if i else b) for i, (a, b) in reversed([*enumerate(steps)]))
        self.final = nn.Sequential(ConvBlock(widths[0], widths[0]), nn.Conv1d(widths[0], actions, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return actions of the shape of x, (N, actions, steps)."""
        skips, time = [], x.mean(2)
        for first, second, condition in zip(self.first, self.second, self.condition, strict=True):
            scale, bias = condition(time).unsqueeze(2).chunk(2, dim=1)
            x = second(scale * first(x) + bias)
            skips.append(x)
            x = nn.functional.avg_pool1d(x, 2)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1))
        y: Tensor = self.final(x)
        return y
