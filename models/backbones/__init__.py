"""The encoders by name. Each maps (B, 3, H, W) to four maps, fine to coarse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from errors import UserError, nearest
from models.backbones.library import DinoV3, ResNet50, Vgg16, pvt_v2
from models.backbones.swin import Swin
from models.base import KeyTable


@dataclass(frozen=True)
class Backbone:
    """How to build an encoder (from a stochastic depth rate), the channels of its maps, its published weights."""

    build: Callable[[float], nn.Module]
    channels: tuple[int, int, int, int]  # fine to coarse
    drop_path: float  # the rate that the official code trains with
    weights: str  # where its authors publish the pretrained encoder: an address, or hf-hub:<repository>


SWIN_WEIGHTS = "https://github.com/SwinTransformer/storage/releases/download"
PVT_WEIGHTS = "https://github.com/whai362/PVT/releases/download/v2"
TORCH_WEIGHTS = "https://download.pytorch.org/models"


def _swin(width: int, depth: int, window: int, weights: str) -> Backbone:
    heads = [width // 32 * 2**i for i in range(4)]
    channels = (width, 2 * width, 4 * width, 8 * width)
    return Backbone(
        lambda rate: Swin(width, [2, 2, depth, 2], heads, window, rate), channels, 0.2, f"{SWIN_WEIGHTS}/{weights}"
    )


def _pvt(size: str, channels: tuple[int, int, int, int]) -> Backbone:
    return Backbone(lambda rate: pvt_v2(size, rate), channels, 0.1, f"{PVT_WEIGHTS}/pvt_v2_{size}.pth")


def _dino(size: str, width: int, depth: int) -> Backbone:
    weights = f"hf-hub:timm/vit_{size}_patch16_dinov3.lvd1689m"
    return Backbone(lambda rate: DinoV3(size, depth, rate), (width, width, width, width), 0.0, weights)


BACKBONES: dict[str, Backbone] = {
    "swin_v1_t": _swin(96, 6, 7, "v1.0.8/swin_tiny_patch4_window7_224_22kto1k_finetune.pth"),
    "swin_v1_s": _swin(96, 18, 7, "v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth"),
    "swin_v1_b": _swin(128, 18, 12, "v1.0.0/swin_base_patch4_window12_384_22kto1k.pth"),
    "swin_v1_l": _swin(192, 18, 12, "v1.0.0/swin_large_patch4_window12_384_22kto1k.pth"),
    "pvt_v2_b0": _pvt("b0", (32, 64, 160, 256)),
    "pvt_v2_b1": _pvt("b1", (64, 128, 320, 512)),
    "pvt_v2_b2": _pvt("b2", (64, 128, 320, 512)),
    "pvt_v2_b5": _pvt("b5", (64, 128, 320, 512)),
    "vgg16": Backbone(lambda rate: Vgg16(False), (128, 256, 512, 512), 0.0, f"{TORCH_WEIGHTS}/vgg16-397923af.pth"),
    "vgg16bn": Backbone(lambda rate: Vgg16(True), (128, 256, 512, 512), 0.0, f"{TORCH_WEIGHTS}/vgg16_bn-6c64b313.pth"),
    "resnet50": Backbone(ResNet50, (256, 512, 1024, 2048), 0.0, f"{TORCH_WEIGHTS}/resnet50-11ad3fa6.pth"),
    "dino_v3_s": _dino("small", 384, 12),
    "dino_v3_s_plus": _dino("small_plus", 384, 12),
    "dino_v3_b": _dino("base", 768, 12),
    "dino_v3_l": _dino("large", 1024, 24),
    "dino_v3_h_plus": _dino("huge_plus", 1280, 32),
    "dino_v3_7b": _dino("7b", 4096, 40),
}


def find_backbone(name: str) -> Backbone:
    """The row of an encoder; `UserError` names the nearest one when there is none."""
    if name not in BACKBONES:
        raise UserError(
            f"model.backbone: there is no {name!r}{nearest(name, BACKBONES)}; known: {', '.join(BACKBONES)}"
        )
    return BACKBONES[name]


def official_keys(encoder: nn.Module) -> KeyTable:
    """An encoder's table from official keys (without their `bb.`) to its own; most need none."""
    table: Callable[[], KeyTable] = getattr(encoder, "official_keys", lambda: [("", "")])
    return table()


def block_depths(names: list[str]) -> tuple[dict[str, int], int]:
    """({parameter name: how many blocks lie below it}, how many blocks there are) of an encoder's parameters.

    Names come in the order of the network; what lies between two blocks counts with the one before it.
    """
    depths, blocks = {}, [""]
    for name in names:
        block = re.match(r".*?(blocks|layer\d|conv\d)\.\d+", name)
        if block and block.group() not in blocks:
            blocks.append(block.group())
        depths[name] = len(blocks) - 1
    return depths, len(blocks) - 1
