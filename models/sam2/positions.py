"""Codes of positions: fixed sines of maps and of time, random frequencies of points, rotations of attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Table = TypeVar("Table")


def kept(build: Callable[..., Table], *arguments: Any) -> Table:
    """A table that `build` makes from hashable arguments, made once and kept."""
    # Sizes are symbols and tensors are fake while a graph is traced: nothing may be kept from there.
    return build(*arguments) if torch.compiler.is_compiling() else _kept(build, *arguments)


@functools.lru_cache(maxsize=32)
def _kept(build: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode(False):  # what is kept here may next be used in training
        return build(*arguments)


def sine_map(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(channels, height, width): sines and cosines of a cell's row in the first half, of its column in the second."""

    def encode(count: int) -> Tensor:
        position = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angles = (position / (count + 1e-6) * 2 * math.pi)[:, None] / _periods(channels // 2, device)
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), 2).flatten(1).T

    rows = encode(height)[:, :, None].expand(-1, -1, width)
    columns = encode(width)[:, None, :].expand(-1, height, -1)
    return torch.cat((rows, columns))


def sine_steps(steps: Tensor, channels: int) -> Tensor:
    """(P,) moments, any float → (P, channels): their sines, then their cosines."""
    angles = steps.float()[:, None] / _periods(channels // 2, steps.device)
    return torch.cat((angles.sin(), angles.cos()), -1)


def _periods(count: int, device: torch.device) -> Tensor:
    """(count,) in pairs of equals, from 1 to nearly 10000."""
    return 10000 ** (2 * (torch.arange(count, dtype=torch.float32, device=device) // 2) / count)


class RandomFrequencies(nn.Module):
    """Positions in [0, 1]² as sines and cosines at random frequencies, which the checkpoint holds."""

    matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(2, channels // 2))

    def forward(self, positions: Tensor) -> Tensor:
        """(..., 2) x and y → (..., channels)."""
        # No matrix product, which mixed precision would compute in 8 bits: a pixel of 1024 needs 10.
        x, y = (4 * math.pi * positions - 2 * math.pi).unbind(-1)
        angles = x[..., None] * self.matrix[0] + y[..., None] * self.matrix[1]
        return torch.cat((angles.sin(), angles.cos()), -1)

    def grid(self, height: int, width: int) -> Tensor:
        """(channels, height, width): the code of every cell's center."""
        device = self.matrix.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centers = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1)
        return self(centers).permute(2, 0, 1)


def rotations(height: int, width: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height·width, channels / 2) that `rotate` takes: half of the pairs of channels turn with a
    cell's column, the others with its row (axial RoPE, Heo et al., 2024, arXiv:2403.13298)."""
    speeds = 10000 ** -(torch.arange(0, channels, 4, dtype=torch.float32, device=device) / channels)
    cells = torch.arange(height * width, device=device)
    angles = torch.cat(((cells % width)[:, None] * speeds, (cells // width)[:, None] * speeds), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """(..., N, C) with every pair of channels, c and C/2 + c, turned by its angle. Real numbers, as ONNX and the
    compiler need."""
    cos, sin = table
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).type_as(x)
