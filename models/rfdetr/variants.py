"""The published sizes under Apache-2.0. Detection XL and 2XL have another licence and are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from errors import UserError, nearest

STORAGE = "https://storage.googleapis.com/rfdetr"


@dataclass(frozen=True)
class Variant:
    """A size: what differs between the published models. Lengths in pixels, blocks counted from 0."""

    patch: int
    windows: int  # on each side of the map
    side: int  # of the position table, in patches; times `patch` it is the size that the weights were trained at
    layers: int  # of the decoder
    queries: int
    weights: str  # where they are published
    taps: tuple[int, ...] = (2, 5, 8, 11)  # encoder blocks after which the projector reads
    global_blocks: tuple[int, ...] = (3, 6, 9)  # encoder blocks that attend across windows
    encoder: str = "small"
    width: int = 256  # of projector and decoder
    self_heads: int = 8
    cross_heads: int = 16
    points: int = 2  # that a head samples in each map
    scales: tuple[float, ...] = (1.0,)  # of the projector's maps to the encoder's


OLD: Any = {"taps": (1, 4, 7, 10), "global_blocks": (2, 5, 8, 11)}  # of the first release

SEGMENTATION = {
    "nano": Variant(12, 1, 26, 4, 100, "rf-detr-seg-n-ft.pth"),
    "small": Variant(12, 2, 32, 4, 100, "rf-detr-seg-s-ft.pth"),
    "medium": Variant(12, 2, 36, 5, 200, "rf-detr-seg-m-ft.pth"),
    "large": Variant(12, 2, 42, 5, 200, "rf-detr-seg-l-ft.pth"),
    "xlarge": Variant(12, 2, 52, 6, 300, "rf-detr-seg-xl-ft.pth"),
    "2xlarge": Variant(12, 2, 64, 6, 300, "rf-detr-seg-2xl-ft.pth"),
    "preview": Variant(12, 2, 36, 4, 200, "rf-detr-seg-preview.pt"),
}
DETECTION = {
    "nano": Variant(16, 2, 24, 2, 300, "nano_coco/checkpoint_best_regular.pth"),
    "small": Variant(16, 2, 32, 3, 300, "small_coco/checkpoint_best_regular.pth"),
    "medium": Variant(16, 2, 36, 4, 300, "medium_coco/checkpoint_best_regular.pth"),
    "large": Variant(16, 2, 44, 4, 300, "rf-detr-large-2026.pth"),
    "base": Variant(14, 4, 37, 3, 300, "rf-detr-base-coco.pth", **OLD),
    "large_deprecated": Variant(
        14, 4, 37, 3, 300, "rf-detr-large.pth", **OLD,
        encoder="base", width=384, self_heads=12, cross_heads=24, points=4, scales=(2.0, 0.5),
    ),
}  # fmt: skip


def find_variant(name: str, masks: bool) -> Variant:
    """The row of a size; `UserError` says which there are with masks and without."""
    table = SEGMENTATION if masks else DETECTION
    if name in table:
        return table[name]
    kind = "with" if masks else "without"
    other = f", which has model.masks {str(not masks).lower()}" if name in SEGMENTATION | DETECTION else ""
    raise UserError(
        f"model.variant: there is no {name!r} {kind} masks{other or nearest(name, table)}; known: {', '.join(table)}"
    )
