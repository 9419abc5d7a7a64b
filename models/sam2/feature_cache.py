"""What a frozen trunk makes of frames, kept from one epoch to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Maps = list[Tensor]


class FeatureCache:
    """Keeps the maps of frames, by where these come from and their size, in at most `limit` bytes of the host's memory.

    Frames that find no room are computed each time. Each is computed by itself, so its maps never depend on what else
    is in a batch, and a run that resumes with an empty cache sees the same bits.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[Hashable, Maps] = {}

    def __call__(self, trunk: Callable[[Tensor], Maps], images: Tensor, keys: Sequence[Hashable]) -> Maps:
        """The maps (N, ·, ·, ·) that the trunk makes of images (N, 3, H, W), whose keys say which they are."""
        each = [self._maps_of(trunk, image, (key, *image.shape)) for image, key in zip(images, keys, strict=True)]
        return [torch.cat(level).to(images.device) for level in zip(*each, strict=True)]

    def _maps_of(self, trunk: Callable[[Tensor], Maps], image: Tensor, key: Hashable) -> Maps:
        if key in self._kept:
            return self._kept[key]
        with torch.no_grad():
            maps = [level.cpu() for level in trunk(image[None])]
        size = sum(level.nbytes for level in maps)
        if self.used + size <= self.limit:
            self._kept[key] = maps
            self.used += size
        return maps
