"""Modulated deformable convolution (Zhu et al., 2019, arXiv:1811.11168) in plain tensor operations.

Numbers equal torchvision's `deform_conv2d` (stride 1, no dilation, one offset group). Written out it trains faster on a
CPU, compiles without a break, runs under bfloat16 autocast, and exports to ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.linear import linear

BAND_VALUES = 2**22  # sampled values held at once on a CPU: 16 MB


class DeformableConv2d(nn.Module):
    """Every output pixel reads its k×k taps where a convolution of the input places them, weighted in 0…2.

    Starts as a common convolution: offsets are 0 and modulators 1. Maps (B, C_in, H, W) to (B, C_out, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        taps, padding = kernel_size**2, kernel_size // 2
        self.offset_conv = nn.Conv2d(in_channels, 2 * taps, kernel_size, padding=padding)
        self.modulator_conv = nn.Conv2d(in_channels, taps, kernel_size, padding=padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        for parameter in (*self.offset_conv.parameters(), *self.modulator_conv.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        # One convolution places and weighs the taps; two would read the input twice.
        weight = torch.cat([self.offset_conv.weight, self.modulator_conv.weight])
        bias = torch.cat([self.offset_conv.get_parameter("bias"), self.modulator_conv.get_parameter("bias")])
        plan = F.conv2d(x, weight, bias, padding=self.offset_conv.padding)
        offset, modulator = plan.split([self.offset_conv.out_channels, self.modulator_conv.out_channels], 1)
        return deformable_convolution(x, offset, 2 * modulator.sigmoid(), self.regular_conv.weight)


def deformable_convolution(x: Tensor, offset: Tensor, modulator: Tensor, weight: Tensor) -> Tensor:
    """Convolve with taps moved by `offset` pixels and multiplied by `modulator`; outside the map everything is 0.

    What is sampled is k² times as large as the input, so it is not kept for backward but sampled again.

    Args:
        x: (B, C_in, H, W).
        offset: (B, 2·k², H, W), rows then columns for each tap.
        modulator: (B, k², H, W).
        weight: (C_out, C_in, k, k), k odd.

    Returns:
        (B, C_out, H, W).
    """
    # Positions need float32 under any autocast: bfloat16 cannot tell neighbouring pixels apart beyond 256.
    inputs = (*(full_precision(tensor) for tensor in (x, offset, modulator)), weight)
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return _convolve_grid(*inputs)
    if x.device.type == "cpu":
        return _BandedConvolution.apply(*inputs)
    if torch.is_grad_enabled():
        return checkpoint(_convolve_grid, *inputs, use_reentrant=False, preserve_rng_state=False)
    return _convolve_grid(*inputs)


def _convolve_grid(x: Tensor, offset: Tensor, modulator: Tensor, weight: Tensor) -> Tensor:
    """One `grid_sample` over all taps and one matrix product: what accelerators, compilers and ONNX do well."""
    height, width = x.shape[-2:]
    rows, columns = _tap_positions(offset, 0)
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1).flatten(1, 2)
    sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = sampled.unflatten(2, (-1, height)) * modulator[:, None]  # B, C_in, k², H, W
    return (weight.flatten(1) @ sampled.flatten(1, 2).flatten(2)).unflatten(2, (height, width))


class _BandedConvolution(torch.autograd.Function):
    """For a CPU: some image rows at a time, so that what is sampled for them is multiplied while still in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, modulator: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, offset, modulator, weight)
        pixels, matrix = _pixels(x), _matrix(weight)
        bands = [
            linear(_sample_band(pixels, offset[:, :, band], modulator[:, :, band], band.start, x.shape[2]), matrix)
            for band in _bands(x, matrix)
        ]
        return torch.cat(bands, 1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, offset, modulator, weight = ctx.saved_tensors
        pixels, matrix = _pixels(x).requires_grad_(), _matrix(weight).to(grad.dtype)
        grad = grad.permute(0, 2, 3, 1)  # B, H, W, C_out
        grad_pixels, grad_matrix = torch.zeros_like(pixels), torch.zeros_like(matrix, dtype=weight.dtype)
        grad_offset, grad_modulator = torch.empty_like(offset), torch.empty_like(modulator)
        for band in _bands(x, matrix):
            inputs = [pixels, *(tensor[:, :, band].detach().requires_grad_() for tensor in (offset, modulator))]
            with torch.enable_grad():
                sampled = _sample_band(inputs[0], inputs[1], inputs[2], band.start, x.shape[2])
            grad_band = grad[:, band].flatten(0, 2)
            grad_matrix += grad_band.T @ sampled.detach().flatten(0, 2).to(grad.dtype)
            grad_sampled = (grad_band @ matrix).view(sampled.shape).to(sampled.dtype)
            parts = torch.autograd.grad(sampled, inputs, grad_sampled)
            grad_pixels += parts[0]
            grad_offset[:, :, band], grad_modulator[:, :, band] = parts[1:]
        grad_x = grad_pixels.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        return grad_x, grad_offset, grad_modulator, grad_matrix.view(_tap_order(weight).shape).permute(0, 3, 1, 2)


def _bands(x: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Ranges of image rows."""
    batch, _, height, width = x.shape
    rows = max(1, BAND_VALUES // (batch * width * matrix.shape[1]))
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) → one row of channels for each pixel, (B·H·W, C)."""
    return x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, C_in, k, k) → (C_out, k²·C_in), taps first."""
    return _tap_order(weight).flatten(1)


def _tap_order(weight: Tensor) -> Tensor:
    return weight.detach().permute(0, 2, 3, 1)


def _sample_band(pixels: Tensor, offset: Tensor, modulator: Tensor, first_row: int, height: int) -> Tensor:
    """What the taps of some output rows read, (B, rows, W, k²·C), each the weighted sum of four pixels.

    `pixels` are those of the whole map, of `height` rows; `offset` and `modulator` those of the rows from `first_row`.
    """
    batch, _, rows, width = modulator.shape
    tap_rows, tap_columns = _tap_positions(offset, first_row)
    row, row_weight = _neighbours(tap_rows, height)
    column, column_weight = _neighbours(tap_columns, width)
    image = torch.arange(batch, dtype=row.dtype).view(-1, 1, 1, 1, 1, 1) * (height * width)
    index = image + row[..., :, None] * width + column[..., None, :]
    row_weight = row_weight * modulator.permute(0, 2, 3, 1)[..., None]
    share = row_weight[..., :, None] * column_weight[..., None, :]
    sampled = F.embedding_bag(index.view(-1, 4), pixels, per_sample_weights=share.view(-1, 4), mode="sum")
    return sampled.view(batch, rows, width, -1)


def _tap_positions(offset: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, (B, k², H, W) in pixels, that the taps of every output pixel read."""
    taps, (height, width) = offset.shape[1] // 2, offset.shape[2:]
    kernel = math.isqrt(taps)
    offset = offset.unflatten(1, (taps, 2))
    reach = torch.arange(kernel, device=offset.device) - kernel // 2
    row = torch.arange(first_row, first_row + height, device=offset.device)[:, None]
    column = torch.arange(width, device=offset.device)
    return (
        offset[:, :, 0] + (row + reach.repeat_interleave(kernel)[:, None, None]),
        offset[:, :, 1] + (column + reach.repeat(kernel)[:, None, None]),
    )


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two whole positions around each (B, k², H, W) → (B, H, W, k², 2) and their weights, 0 outside the map."""
    position = position.permute(0, 2, 3, 1)
    low = position.detach().floor()
    whole = torch.stack([low, low + 1], -1)
    fraction = position - low
    weight = torch.stack([1 - fraction, fraction], -1) * ((whole >= 0) & (whole < size))
    return whole.clamp(0, size - 1).int(), weight


def full_precision(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
