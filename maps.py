"""Maps of logits at another size, a band of rows at a time: memory does not grow with classes × resolution.

Apart because metrics, tasks and inference need the same arg-max, and none of them may import another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from samples import Size

BAND_VALUES = 2**22  # that are held at once, 16 MB: enough rows to keep the device busy


def argmax_at(logits: Tensor, size: Size) -> Tensor:
    """The most likely class of every pixel: (B, C, h, w) -> (B, *size), uint8 where all classes fit, else int64.

    The same as the arg-max of the whole map, bilinear with corners not aligned, as SegFormer's authors evaluate.
    """
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    # Of equal meaning, argmax takes about a third longer along this axis on a CPU.
    return torch.cat([band.max(1).indices.to(dtype) for band in bands(logits, size)], 1)


def bands(logits: Tensor, size: Size) -> Iterator[Tensor]:
    """(B, C, rows, width) float32 bands, top to bottom, of (B, C, h, w) logits resized to `size`."""
    batch, classes, rows, _ = logits.shape
    height, width = size
    step = max(1, BAND_VALUES // (batch * classes * width))
    sources = source_rows(rows, height, torch.float32, logits.device)
    for above, below, share in zip(*(each.split(step) for each in sources), strict=True):
        narrow = torch.lerp(logits[:, :, above].float(), logits[:, :, below].float(), share)
        yield F.interpolate(narrow, (len(share), width), mode="bilinear")


def source_rows(rows: int, height: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What each of `height` rows is made of when `rows` are resized: (upper row, lower row, share of the lower one).

    The indices are (height,) int64, the shares (height, 1) in [0, 1).
    """
    position = (torch.arange(height, dtype=dtype, device=device) + 0.5) * (rows / height) - 0.5
    position = position.clamp(min=0)
    upper = position.long()
    return upper, (upper + 1).clamp(max=rows - 1), (position - upper).unsqueeze(1)
