"""Encoders whose layers come from timm or torchvision, brought to four maps and the official key names."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from models.base import KeyTable, checkpointed

DINOV3_LAYERS = {12: (3, 5, 7, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31), 40: (9, 19, 29, 39)}


def pvt_v2(size: str, drop_path: float) -> PvtV2:
    """Pyramid Vision Transformer v2 (Wang et al., 2022, arXiv:2106.13797)."""
    return PvtV2(timm.create_model(f"pvt_v2_{size}", num_classes=0, drop_path_rate=drop_path))


def mix_transformer(widths: tuple[int, ...], depths: tuple[int, ...], drop_path: float, norm_eps: float) -> PvtV2:
    """SegFormer's encoder (Xie et al., 2021, arXiv:2105.15203): a PVT v2 of other heads and narrower MLPs.

    `norm_eps` is that of the norms of blocks and stages; the norms of patches and reduced keys always have 1e-5.
    """
    norm: Any = partial(nn.LayerNorm, eps=norm_eps)
    net = PyramidVisionTransformerV2(
        embed_dims=widths,
        depths=depths,
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(4, 4, 4, 4),
        num_classes=0,
        drop_path_rate=drop_path,
        norm_layer=norm,
    )
    return PvtV2(net)


class PvtV2(nn.Module):
    """Patches, stages and their norms of one of timm's networks: four maps at strides 4 to 32."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.patch_embed, self.stages = net.patch_embed, net.stages
        self.checkpointing = False

    def forward(self, images: Tensor) -> list[Tensor]:
        x, features = self.patch_embed(images), []
        for stage in self.stages:
            stage.grad_checkpointing = self.checkpointing and self.training
            x = stage(x)
            features.append(x)
        return features

    def official_keys(self) -> KeyTable:
        table = [("patch_embed1", "patch_embed")]
        table += [(f"patch_embed{i + 1}", f"stages.{i}.downsample") for i in range(1, 4)]
        for i, stage in enumerate(self.stages):
            for j in range(len(stage.blocks)):
                official, own = f"block{i + 1}.{j}", f"stages.{i}.blocks.{j}"
                table += [(f"{official}.{part}", f"{own}.{part}") for part in ("norm1", "attn", "norm2", "mlp.fc1")]
                table += [(f"{official}.mlp.dwconv.dwconv", f"{own}.mlp.dwconv")]
                table += [(f"{official}.mlp.fc2", f"{own}.mlp.fc2")]
            table += [(f"norm{i + 1}", f"stages.{i}.norm")]
        return table


class ResNet50(nn.Module):
    """ResNet-50: four maps at strides 4 to 32."""

    def __init__(self, drop_path: float) -> None:
        super().__init__()
        net: Any = timm.create_model("resnet50", num_classes=0, drop_path_rate=drop_path)
        self.conv1, self.bn1, self.act1, self.maxpool = net.conv1, net.bn1, net.act1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.checkpointing = False

    def forward(self, images: Tensor) -> list[Tensor]:
        x, features = self.maxpool(self.act1(self.bn1(self.conv1(images)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = checkpointed(stage, x) if self.checkpointing and self.training else stage(x)
            features.append(x)
        return features

    def official_keys(self) -> KeyTable:
        stem = [("conv1.0", "conv1"), ("conv1.1", "bn1"), ("conv1.4", "layer1")]
        return stem + [(f"conv{i}", f"layer{i}") for i in (2, 3, 4)]


class Vgg16(nn.Module):
    """VGG-16 with or without BatchNorm: four maps at strides 4 to 32, each after its pooling."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        layers = make_layers(cfgs["D"], batch_norm=batch_norm)
        pools = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        starts = [0, *pools[1:-1]]  # the first two pools lie within the first stage
        for stage, (start, stop) in enumerate(zip(starts, pools[1:], strict=True), start=1):
            self.add_module(f"conv{stage}", layers[start:stop])
        self.checkpointing = False

    def forward(self, images: Tensor) -> list[Tensor]:
        x, features = images, []
        for stage in self.children():
            x = checkpointed(stage, x) if self.checkpointing and self.training else stage(x)
            features.append(x)
        return features

    def published_key(self, key: str) -> str:
        """torchvision counts layers through, `features.12.weight`; here they stand in stages, `conv2.12.weight`."""
        number = key.removeprefix("features.").partition(".")[0]
        stages = [name for name, stage in self.named_children() if number in dict(stage.named_children())]
        return f"{stages[0]}.{key.removeprefix('features.')}" if key.startswith("features.") and stages else key


class DinoV3(nn.Module):
    """DINOv3 vision transformer (Siméoni et al., 2025, arXiv:2508.10104): four maps, all at stride 16."""

    def __init__(self, size: str, depth: int, drop_path: float) -> None:
        super().__init__()
        name = f"vit_{size}_patch16_dinov3"
        options: dict[str, Any] = {
            "out_indices": DINOV3_LAYERS[depth],
            "dynamic_img_size": True,
            "drop_path_rate": drop_path,
        }
        net: Any = timm.create_model(name, features_only=True, **options)
        self.model = net.model
        self.layers = DINOV3_LAYERS[depth]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, indices=self.layers, intermediates_only=True)

    def published_key(self, key: str) -> str:
        return f"model.{key}"
