"""Modulated deformable convolution (Zhu et al., 2019, arXiv:1811.11168) in plain tensor operations.

Numbers equal torchvision's `deform_conv2d` (stride 1, no dilation, one offset group). Written out it trains faster on a
CPU, compiles without a break, runs under bfloat16 autocast, and exports to ONNX.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DeformableConv2d(nn.Module):
    """Every output pixel reads its k×k taps where a convolution of the input places them, weighted in 0…2.

    Starts as a common convolution: offsets are 0 and modulators 1. Maps (B, C_in, H, W) to (B, C_out, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        taps, padding = kernel_size**2, kernel_size // 2
        self.offset_conv = nn.Conv2d(in_channels, 2 * taps, kernel_size, padding=padding)
        self.modulator_conv = nn.Conv2d(in_channels, taps, kernel_size, padding=padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        for convolution in (self.offset_conv, self.modulator_conv):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        # One convolution places and weighs the taps; two would read the input twice.
        weight = torch.cat([self.offset_conv.weight, self.modulator_conv.weight])
        bias = torch.cat([self.offset_conv.bias, self.modulator_conv.bias])
        plan = F.conv2d(x, weight, bias, padding=self.offset_conv.padding)
        offset, modulator = plan.split([self.offset_conv.out_channels, self.modulator_conv.out_channels], 1)
        arguments = (x, offset, 2 * modulator.sigmoid(), self.regular_conv.weight)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The sampled columns are k² times as large as the input: taken again in backward rather than kept.
            return checkpoint(deformable_convolution, *arguments, use_reentrant=False, preserve_rng_state=False)
        return deformable_convolution(*arguments)


def deformable_convolution(x: Tensor, offset: Tensor, modulator: Tensor, weight: Tensor) -> Tensor:
    """Convolve with taps moved by `offset` pixels and multiplied by `modulator`; outside the map everything is 0.

    Args:
        x: (B, C_in, H, W).
        offset: (B, 2·k², H, W), rows then columns for each tap.
        modulator: (B, k², H, W).
        weight: (C_out, C_in, k, k), k odd.

    Returns:
        (B, C_out, H, W).
    """
    batch, _, height, width = x.shape
    # Positions need float32 under any autocast: bfloat16 cannot tell neighbouring pixels apart beyond 256.
    rows, columns = _tap_positions(offset.float(), weight.shape[-1])
    x, modulator = x.float(), modulator.float()
    if x.device.type == "cpu" and not torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export():
        sampled = _sample_rows(x, rows, columns, modulator)  # (B·H·W, k²·C)
        out = sampled @ weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        return out.view(batch, height, width, -1).permute(0, 3, 1, 2)
    sampled = _sample_grid(x, rows, columns, modulator)  # (B, C·k², H·W)
    return (weight.flatten(1) @ sampled).unflatten(2, (height, width))


def _tap_positions(offset: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Rows and columns (B, k², H, W), in pixels, that the taps of every output pixel read."""
    height, width = offset.shape[-2:]
    offset = offset.unflatten(1, (kernel * kernel, 2))
    reach = torch.arange(kernel, device=offset.device) - kernel // 2
    row = torch.arange(height, device=offset.device)[:, None] + reach.repeat_interleave(kernel)[:, None, None]
    column = torch.arange(width, device=offset.device) + reach.repeat(kernel)[:, None, None]
    return offset[:, :, 0] + row, offset[:, :, 1] + column


def _sample_rows(x: Tensor, rows: Tensor, columns: Tensor, modulator: Tensor) -> Tensor:
    """Bilinear samples as weighted sums of four pixels' channel vectors: contiguous reads, fast on a CPU."""
    height, width = x.shape[-2:]
    row, row_weight = _neighbours(rows, height)
    column, column_weight = _neighbours(columns, width)
    image = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1, 1, 1) * (height * width)
    pixels = image + row[..., :, None] * width + column[..., None, :]
    weights = row_weight[..., :, None] * column_weight[..., None, :] * modulator.permute(0, 2, 3, 1)[..., None, None]
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    sampled = F.embedding_bag(pixels.reshape(-1, 4), table, per_sample_weights=weights.reshape(-1, 4), mode="sum")
    return sampled.view(-1, rows.shape[1] * x.shape[1])


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two whole positions around each (B, k², H, W) → (B, H, W, k², 2) and their weights, 0 outside the map."""
    position = position.permute(0, 2, 3, 1)
    low = position.detach().floor()
    weight = torch.stack([low + 1 - position, position - low], -1)
    whole = torch.stack([low, low + 1], -1)
    inside = (whole >= 0) & (whole < size)
    return whole.clamp(0, size - 1).long(), weight * inside


def _sample_grid(x: Tensor, rows: Tensor, columns: Tensor, modulator: Tensor) -> Tensor:
    """The same through one `grid_sample` over all taps, which every accelerator and ONNX have."""
    height, width = x.shape[-2:]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1).flatten(1, 2)
    sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled.unflatten(2, (rows.shape[1], height)) * modulator[:, None]).flatten(1, 2).flatten(2)
