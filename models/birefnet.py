"""BiRefNet: bilateral reference for high-resolution dichotomous segmentation (Zheng et al., 2024, arXiv:2401.03407).

An encoder sees the image at two scales. A decoder goes from its coarsest map to the finest; at every level it looks at
the image itself again (the inward reference) and learns where there is detail worth drawing (the outward reference).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from models.backbones import BACKBONES, block_depths, find_backbone, official_keys
from models.base import KeyTable, LoadReport, Logits, Model, checkpointed, key_pairs, unwrap
from models.deformable import DeformableConv2d

NECK_CHANNELS = (192, 384, 768, 1536)  # a plain transformer's maps are brought to Swin-L's channels, fine to coarse

DERIVED = ("relative_position_index", "num_batches_tracked")  # buffers of whole numbers, which some files leave out

# Other releases (HR, dynamic, matting, one per benchmark) load as model.pretrained: hf-hub:ZhengPeng7/<name>.
OFFICIAL_WEIGHTS = {"swin_v1_l": "hf-hub:ZhengPeng7/BiRefNet", "swin_v1_t": "hf-hub:ZhengPeng7/BiRefNet_lite"}

BlockBuilder = Callable[[int, int], nn.Module]


class BiRefNet(Model):
    """Soft mask of the foreground of an image whose sides are multiples of 32.

    Training returns `logits` (B, 1, H, W), the final map, and where the settings ask for them
    `levels` (logits of the coarser levels, coarse to fine: (B, 1, H/32, W/32), /16, /8, then the unrefined final map
    where there is a refinement), `gradient_logits` (of the same three levels), `gradient_labels` (their targets
    before the sigmoid, (B, 1, H, W) each), and `class_logits` (B, classes). Evaluation returns `logits` alone.

    Args:
        backbone: name of the encoder, see `models.backbones`.
        multi_scale_input: how the encoder's maps of the half-sized image join those of the full one:
            "cat" (upsampled and concatenated), "add", or "none".
        context: how many of the finer maps (0 to 3) are shrunk and joined to the coarsest.
        squeeze_block: blocks between encoder and decoder, `<Block>_x<count>` of BasicDecBlk, ResBlk, ASPP or
            ASPPDeformable; empty for none.
        decoder_block: "BasicDecBlk" or "ResBlk".
        decoder_attention: what stands in the middle of a block: "ASPPDeformable", "ASPP" or "none".
        decoder_channels: inner width of a block: "fixed" (64) or "adaptive" (a quarter of its input).
        decoder_input: whether the decoder sees the image at every level,
        decoder_input_split: cut into patches that are stacked as channels, rather than shrunk.
        multi_scale_supervision: predict a mask at every level in training.
        gradient_supervision: gate every level by where detail is expected; only with `multi_scale_supervision`.
        auxiliary_classes: size of the classification head used in training; 0 for none.
        refine: "unet" corrects the final logits once more from image and mask.
        drop_path: stochastic depth of the encoder; None for its official rate.
        dropout: after every ASPP.
        freeze_backbone: None freezes DINOv3 only, as the official code does.
    """

    stride = 32
    encoder = "backbone."

    def __init__(
        self,
        backbone: str = "swin_v1_t",
        multi_scale_input: str = "cat",
        context: int = 3,
        squeeze_block: str = "BasicDecBlk_x1",
        decoder_block: str = "BasicDecBlk",
        decoder_attention: str = "ASPPDeformable",
        decoder_channels: str = "fixed",
        decoder_input: bool = True,
        decoder_input_split: bool = True,
        multi_scale_supervision: bool = True,
        gradient_supervision: bool = True,
        auxiliary_classes: int = 0,
        refine: str = "none",
        drop_path: float | None = None,
        dropout: float = 0.5,
        freeze_backbone: bool | None = None,
    ) -> None:
        super().__init__()
        row = find_backbone(backbone)
        plain_transformer = backbone.startswith("dino")
        self.backbone_name = backbone
        self.multi_scale_input = multi_scale_input
        self.context = context

        # Built with some stochastic depth whatever the rate, so that a schedule can raise it later.
        self.backbone = row.build(row.drop_path or 0.1)
        self.set_drop_path(row.drop_path if drop_path is None else drop_path)

        scales = 2 if multi_scale_input == "cat" else 1
        channels = [width * scales for width in row.channels]
        neck = [width * scales for width in NECK_CHANNELS] if plain_transformer else None
        self.classifier = nn.Linear(channels[3], auxiliary_classes) if auxiliary_classes else None

        def build_block(name: str, in_channels: int, out_channels: int) -> nn.Module:
            if name in ("ASPP", "ASPPDeformable"):
                return ASPP(in_channels, out_channels, name == "ASPPDeformable", dropout)
            inner = 64 if decoder_channels == "fixed" else in_channels // 4
            return Block(in_channels, inner, out_channels, decoder_attention, dropout, name == "ResBlk")

        deepest = channels[3] + sum(channels[3 - context : 3])
        self.squeeze = nn.Sequential()
        if squeeze_block:
            name, count = squeeze_block.split("_x")
            for _ in range(int(count)):
                self.squeeze.append(build_block(name, deepest, channels[3]))
                deepest = channels[3]

        self.decoder = Decoder(
            channels,
            deepest,
            neck,
            lambda in_channels, out_channels: build_block(decoder_block, in_channels, out_channels),
            image=decoder_input,
            split=decoder_input_split,
            supervised=multi_scale_supervision,
            gated=multi_scale_supervision and gradient_supervision,
        )
        self.refiner = RefineUNet() if refine == "unet" else None
        if plain_transformer if freeze_backbone is None else freeze_backbone:
            self.freeze(["backbone"])

    def forward(self, batch: Any) -> dict[str, Any]:
        images: Tensor = getattr(batch, "images", batch)
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and (height % self.stride or width % self.stride):
            raise UserError(f"an input of {width}×{height} pixels: BiRefNet needs sides that are multiples of 32")
        features = self.encode(images)
        outputs: dict[str, Any] = {}
        if self.training and self.classifier is not None:
            outputs["class_logits"] = self.classifier(features[3].mean((2, 3)))
        features[3] = self.squeeze(self.join_context(features))
        outputs |= self.decoder(images, features)
        if "gradient_logits" in outputs:
            detail = laplacian(images.mean(1, keepdim=True))
            outputs["gradient_labels"] = [detail * resize(level, images) for level in outputs["levels"]]
        if self.refiner is not None:
            coarse = outputs["logits"]
            outputs["logits"] = self.refiner(images, coarse)
            if self.training:
                outputs["levels"] = [*outputs.get("levels", []), coarse]
        return outputs

    def encode(self, images: Tensor) -> list[Tensor]:
        """Four maps, fine to coarse, of the image and its half-sized copy."""
        features = list(self.backbone(images))
        if self.multi_scale_input == "none":
            return features
        half = F.interpolate(
            images, (images.shape[-2] // 2, images.shape[-1] // 2), mode="bilinear", align_corners=True
        )
        half_features = [resize(small, full) for small, full in zip(self.backbone(half), features, strict=True)]
        if self.multi_scale_input == "add":
            return [full + small for full, small in zip(features, half_features, strict=True)]
        return [torch.cat(pair, 1) for pair in zip(features, half_features, strict=True)]

    def join_context(self, features: list[Tensor]) -> Tensor:
        """The coarsest map behind the `context` finer ones, shrunk to its size."""
        shrunk = [resize(feature, features[3]) for feature in features[3 - self.context : 3]]
        return torch.cat([*shrunk, features[3]], 1)

    def layer_depth(self, name: str) -> tuple[int, int]:
        depths, total = self._encoder_depths
        return depths.get(name, total), total

    @cached_property
    def _encoder_depths(self) -> tuple[dict[str, int], int]:
        return block_depths([name for name, _ in self.named_parameters() if name.startswith(self.encoder)])

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """One graph: normalised `images` (B, 3, H, W) → `logits` (B, 1, H, W)."""
        axes = {0: "batch", 2: "height", 3: "width"}
        # So large that Swin's coarsest map of the half-sized copy has several windows: one is taken to be one always.
        example = torch.zeros(2, 3, 1088, 1216)
        return {"birefnet": (Logits(self), (example,), {"images": axes, "logits": axes})}

    def official_keys(self) -> KeyTable:
        encoder = [
            (f"bb.{key}".rstrip("."), f"backbone.{own}".rstrip(".")) for key, own in official_keys(self.backbone)
        ]
        return encoder + OFFICIAL_KEYS

    def ignores(self, key: str) -> bool:
        return key.startswith("cls_head.")  # checkpoints of the first generation carry a head that nothing uses

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """As in `Model`. The official code trains without BatchNorm at batch size 1; loading such a checkpoint makes
        the decoder's BatchNorms identities in evaluation, so the outputs are the official ones."""
        report = super().load_official(state_dict)
        norms = {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.BatchNorm2d) and name.startswith(("squeeze.", "decoder."))
        }
        norm_keys = {
            key
            for key, name in key_pairs(self.state_dict(), self.official_keys()).items()
            if name.rpartition(".")[0] in norms
        }
        if "decoder.conv_out1.0.weight" in report.loaded and norm_keys.isdisjoint([*report.loaded, *report.reshaped]):
            for norm in norms.values():
                make_identity(norm)
            report.missing = [key for key in report.missing if key not in norm_keys]
            report.notes.append(f"{len(norms)} BatchNorms act as identities, for it was trained without them")
        return report

    def published_weights(self) -> dict[str, str]:
        """Addresses of the encoder's weights, and of BiRefNet's own general ones for the encoders that have some."""
        own = {"official": OFFICIAL_WEIGHTS[self.backbone_name]} if self.backbone_name in OFFICIAL_WEIGHTS else {}
        return {"backbone": BACKBONES[self.backbone_name].weights, **own}

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load the encoder alone from the weights that its authors publish (`models.backbones.BACKBONES`)."""
        own_to_official = {own: key for key, own in key_pairs(self.state_dict(), self.official_keys()).items()}
        translate = getattr(self.backbone, "published_key", lambda key: key)
        renamed = {}
        for key, tensor in unwrap(state_dict).items():
            renamed[own_to_official.get(self.encoder + translate(key), f"bb.{key}")] = tensor
        report = super().load_official(renamed)
        report.missing = [key for key in report.missing if key.startswith("bb.")]
        return report

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an official checkpoint, from the names and shapes of its tensors.

        Adding the half-scale maps leaves no trace in the shapes, so "none" may stand for "add". Raises `UserError`
        when no known encoder fits.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in unwrap(state_dict).items()}
        if not any(key.startswith("decoder.decoder_block4.") for key in shapes):  # building every encoder takes long
            raise UserError("the checkpoint is no BiRefNet: it has no decoder.decoder_block4")
        name = _infer_backbone(shapes)
        channels = list(find_backbone(name).channels)
        entry = (
            "decoder.pyramid_neck_x3.conv.weight" if name.startswith("dino") else "decoder.lateral_block4.conv.weight"
        )
        if shapes[entry][1] == 2 * channels[2]:
            multi_scale_input, channels = "cat", [2 * width for width in channels]
        else:
            multi_scale_input = "none"
        squeeze = [key for key in shapes if key.startswith("squeeze_module.0.")]
        block4 = [key for key in shapes if key.startswith("decoder.decoder_block4.")]
        if squeeze:
            count = len({key.split(".")[1] for key in shapes if key.startswith("squeeze_module.")})
            squeeze_block = f"{_block_kind(squeeze)}_x{count}"
            entries = ("conv_in", "global_avg_pool.1")
            deepest = next(shapes[key][1] for key in squeeze if key.endswith(tuple(f"0.{e}.weight" for e in entries)))
        else:
            squeeze_block = ""
            if name.startswith("dino"):
                deepest = shapes["decoder.pyramid_neck_x4.conv.weight"][1]
            else:
                deepest = shapes["decoder.decoder_block4.conv_in.weight"][1]
                deepest -= shapes.get("decoder.ipt_blk5.conv_out.weight", (0,))[0]
        contexts = [n for n in range(4) if channels[3] + sum(channels[3 - n : 3]) == deepest]
        attention = "none"
        if any(".dec_att." in key for key in block4):
            attention = "ASPPDeformable" if any(".aspp_deforms." in key for key in block4) else "ASPP"
        inner = {shapes[f"decoder.decoder_block{level}.conv_in.weight"][0] for level in (4, 3, 2, 1)}
        classes = shapes.get("cls_head.0.weight", (0, 0))
        return {
            "backbone": name,
            "multi_scale_input": multi_scale_input,
            "context": contexts[0] if contexts else 0,
            "squeeze_block": squeeze_block,
            "decoder_block": _block_kind(block4),
            "decoder_attention": attention,
            "decoder_channels": "fixed" if inner == {64} else "adaptive",
            "decoder_input": "decoder.ipt_blk5.conv1.weight" in shapes,
            "decoder_input_split": shapes.get("decoder.ipt_blk5.conv1.weight", (0, 0))[1] != 3,
            "multi_scale_supervision": "decoder.conv_ms_spvn_4.weight" in shapes,
            "gradient_supervision": "decoder.gdt_convs_4.0.weight" in shapes,
            "auxiliary_classes": classes[0] if classes[1] == channels[3] else 0,
            "refine": "unet" if "refiner.out.weight" in shapes else "none",
        }


class Decoder(nn.Module):
    """Four stages, coarse to fine, and a head at full resolution.

    Args:
        channels: of the encoder's maps, fine to coarse.
        deepest: channels of the coarsest map as it arrives here.
        neck: channels to bring the maps to first, for encoders whose maps all have one size; None for the others.
        block: builds a stage's block from its input and output channels.
        image: whether every stage sees the image; split: as stacked patches.
        supervised: whether every stage but the last predicts a mask in training.
        gated: whether it is gated by where detail is expected.
    """

    def __init__(
        self,
        channels: list[int],
        deepest: int,
        neck: list[int] | None,
        block: BlockBuilder,
        image: bool,
        split: bool,
        supervised: bool,
        gated: bool,
    ) -> None:
        super().__init__()
        inputs = [*channels[:3], deepest]
        self.neck = None
        if neck:
            self.neck = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(inputs, neck, strict=True))
            inputs = neck
        outputs = [inputs[0] // 2, *inputs[:3]]
        views = [width // 8 for width in (*channels, channels[3])]  # the head, then the stages from fine to coarse
        self.stages = nn.ModuleList(
            Stage(
                inputs[level],
                outputs[level],
                block,
                lateral=level < 3,
                view=ImageView(views[level + 1], patch=4 * 2**level if split else None) if image else None,
                supervised=supervised and level > 0,
                gated=gated and level > 0,
            )
            for level in (3, 2, 1, 0)
        )
        self.head = Head(outputs[0], ImageView(views[0], patch=1) if image else None)

    def forward(self, images: Tensor, features: list[Tensor]) -> dict[str, Any]:
        """`features` fine to coarse → `logits`, and in training `levels` and `gradient_logits`, as in `BiRefNet`."""
        if self.neck is not None:
            height, width = images.shape[-2:]
            sizes = [(height // scale, width // scale) for scale in (4, 8, 16, 32)]
            features = [
                conv(F.interpolate(feature, size, mode="bilinear", align_corners=True))
                for conv, feature, size in zip(self.neck, features, sizes, strict=True)
            ]
        x, levels, gradients = features[3], [], []
        for stage, feature in zip(self.stages, reversed(features), strict=True):
            x, level, gradient = stage(x, feature, images)
            levels.append(level)
            gradients.append(gradient)
        outputs = {"logits": self.head(x, images)}
        if self.training and levels[0] is not None:
            outputs["levels"] = levels[:3]
        if self.training and gradients[0] is not None:
            outputs["gradient_logits"] = gradients[:3]
        return outputs


class Stage(nn.Module):
    """One level of the decoder: joins the encoder's map and the image to what came from below, and refines it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block: BlockBuilder,
        lateral: bool,
        view: ImageView | None,
        supervised: bool,
        gated: bool,
    ) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(in_channels, in_channels, 1) if lateral else None
        self.view = view
        self.block = block(in_channels + (view.out_channels if view is not None else 0), out_channels)
        self.mask = nn.Conv2d(out_channels, 1, 1) if supervised else None
        self.gate = Gate(out_channels) if gated else None
        self.checkpointing = False

    def forward(self, x: Tensor, feature: Tensor, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output of the coarser stage, the encoder's map, images) → output, mask logits, gradient logits."""
        x = feature if self.lateral is None else resize(x, feature) + self.lateral(feature)
        if self.view is not None:
            x = torch.cat([x, self.view(images, x)], 1)
        x = checkpointed(self.block, x) if self.checkpointing and self.training else self.block(x)
        level = self.mask(x) if self.mask is not None and self.training else None
        if self.gate is None:
            return x, level, None
        x, gradient = self.gate(x)
        return x, level, gradient


class Gate(nn.Module):
    """The outward reference: predicts the image's gradient within the object, and lets through where it expects any."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.predict = nn.Conv2d(16, 1, 1)
        self.attend = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.features(x)
        return x * self.attend(features).sigmoid(), self.predict(features) if self.training else None


class ImageView(nn.Module):
    """The inward reference: the image at a map's size, in `patch`² stacked pixels or shrunk, after two convolutions."""

    def __init__(self, out_channels: int, patch: int | None) -> None:
        super().__init__()
        self.out_channels, self.patch = out_channels, patch
        self.conv1 = nn.Conv2d(3 * (patch or 1) ** 2, 64, 3, padding=1)
        self.conv_out = nn.Conv2d(64, out_channels, 3, padding=1)

    def forward(self, images: Tensor, like: Tensor) -> Tensor:
        view = resize(images, like) if self.patch is None else stack_patches(images, self.patch)
        return self.conv_out(self.conv1(view))

    def mixed(self, images: Tensor, mix: Tensor) -> Tensor:
        """The view at full resolution with its channels summed by `mix` (1, C): (B, 1, H, W), without the view itself.

        Each of the last convolution's nine taps becomes a channel of the first one, and these are added up where the
        taps lie. The zeros around them are the padding of the hidden map, so the numbers hold at the border too.
        """
        hidden_weight, hidden_bias = self.conv1.weight, self.conv1.get_parameter("bias")
        taps = (mix @ self.conv_out.weight.flatten(1)).view(-1, 9).T  # 9, hidden channels
        weight = (taps @ hidden_weight.flatten(1)).view(9, *hidden_weight.shape[1:])
        maps = F.pad(F.conv2d(images, weight, taps @ hidden_bias, padding=1), (1, 1, 1, 1)).unbind(1)
        height, width = images.shape[-2:]
        shifted = [m[:, t // 3 : t // 3 + height, t % 3 : t % 3 + width] for t, m in enumerate(maps)]
        return torch.stack(shifted, 1).sum(1, keepdim=True) + mix @ self.conv_out.get_parameter("bias")


class Head(nn.Module):
    """The last map and the image, at full resolution, to logits.

    Nothing between these layers is non-linear, so their weights are multiplied first and no wide map is ever made at
    full resolution: the 1×1 convolution `out` comes before the upsampling, and joins the image's two convolutions.
    """

    def __init__(self, in_channels: int, view: ImageView | None) -> None:
        super().__init__()
        self.view = view
        self.out = nn.Conv2d(in_channels + (view.out_channels if view is not None else 0), 1, 1)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        if self.view is None:
            return resize(self.out(x), images)
        from_map, from_view = self.out.weight.split([x.shape[1], self.view.out_channels], 1)
        seen = self.view.mixed(images, from_view.flatten(1))
        return resize(F.conv2d(x, from_map, self.out.bias), images) + seen


class Block(nn.Module):
    """Two 3×3 convolutions around an attention; with a 1×1 shortcut in the residual kind."""

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, attention: str, dropout: float, residual: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, inner, 3, padding=1)
        if residual:
            self.bn_in = nn.BatchNorm2d(inner)
        self.dec_att = None if attention == "none" else ASPP(inner, inner, attention == "ASPPDeformable", dropout)
        self.conv_out = nn.Conv2d(inner, out_channels, 3, padding=1)
        if not residual:  # the official code declares the norms in another order here, and its checkpoints keep it
            self.bn_in = nn.BatchNorm2d(inner)
        self.bn_out = nn.BatchNorm2d(out_channels)
        self.conv_resi = nn.Conv2d(in_channels, out_channels, 1) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn_in(self.conv_in(x)))
        if self.dec_att is not None:
            inner = self.dec_att(inner)
        out = self.bn_out(self.conv_out(inner))
        return out if self.conv_resi is None else out + self.conv_resi(x)


class ASPP(nn.Module):
    """Parallel branches of growing reach and one over the whole map, joined (Chen et al., 2017, arXiv:1706.05587).

    Plain: dilated 3×3 convolutions. Deformable: kernels 1, 1, 3 and 7 whose taps are placed by the input.
    """

    def __init__(self, in_channels: int, out_channels: int, deformable: bool, dropout: float) -> None:
        super().__init__()
        width = 256
        if deformable:
            self.aspp1 = Branch(DeformableConv2d(in_channels, width, 1))
            self.aspp_deforms = nn.ModuleList(Branch(DeformableConv2d(in_channels, width, k)) for k in (1, 3, 7))
        else:
            self.aspp1 = Branch(nn.Conv2d(in_channels, width, 1, bias=False))
            for i, dilation in enumerate((6, 12, 18), start=2):
                conv = nn.Conv2d(in_channels, width, 3, padding=dilation, dilation=dilation, bias=False)
                self.add_module(f"aspp{i}", Branch(conv))
        self.branches = [module for module in self.modules() if isinstance(module, Branch)]
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, width, 1, bias=False),
            PooledBatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * width, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        local = torch.cat([branch(x) for branch in self.branches], 1)
        # The pooled branch is constant over the map: its share of the last convolution is added once per image.
        from_local, from_pooled = self.conv1.weight.split([local.shape[1], local.shape[1] // 4], 1)
        joined = F.conv2d(local, from_local) + F.conv2d(self.global_avg_pool(x), from_pooled)
        return self.dropout(F.relu(self.bn1(joined)))


class Branch(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, conv: nn.Conv2d | DeformableConv2d) -> None:
        super().__init__()
        self.atrous_conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))


class PooledBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of a 1×1 map, which in a batch of one has no variance: there it uses the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == self.num_features:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class RefineUNet(nn.Module):
    """A small U-Net on image and coarse mask, which adds a correction to the coarse logits; it starts at zero.

    The family's earlier code ended in such a network (its `RefUNet`, after BASNet, Qin et al., 2019).
    """

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(_conv_bn_relu(width if i else 4, width) for i in range(depth + 1))
        self.up = nn.ModuleList(_conv_bn_relu(2 * width, width) for _ in range(depth))
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        self.checkpointing = False

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        run = checkpointed if self.checkpointing and self.training else lambda block, x: block(x)
        x, skips = torch.cat([images, logits.sigmoid()], 1), []
        for i, block in enumerate(self.down):
            x = run(block, F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = run(block, torch.cat([resize(x, skip), skip], 1))
        return logits + self.out(x)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, with corners aligned, to the height and width of `like`."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


def stack_patches(images: Tensor, patch: int) -> Tensor:
    """Cut a grid of patch × patch tiles and stack them as channels: (B, C, H, W) → (B, C·patch², H/patch, W/patch).

    Each output channel is one tile of the image, C slowest, then the tile's row, then its column.
    """
    tiles = images.unflatten(3, (patch, -1)).unflatten(2, (patch, -1))  # B, C, row, h, column, w
    return tiles.transpose(3, 4).flatten(1, 3)


def laplacian(x: Tensor) -> Tensor:
    """5×5 Laplacian of (B, 1, H, W) with mirrored borders: ones around −24, divided by 48 as kornia does."""
    return (F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, stride=1) - x) * (25 / 48)


def make_identity(norm: nn.BatchNorm2d) -> None:
    """Make a BatchNorm return its input, to the last bit, in evaluation."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1 - norm.eps}
    for name, tensor in norm.state_dict().items():
        if name in values:
            tensor.fill_(values[name])


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _infer_backbone(shapes: dict[str, tuple[int, ...]]) -> str:
    """The encoder whose tensors are the checkpoint's `bb.` tensors; built without memory to be compared."""
    theirs = {key for key in shapes if key.startswith("bb.")}
    for name, row in BACKBONES.items():
        with torch.device("meta"):
            encoder = row.build(0.0)
        own = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items() if tensor.is_floating_point()}
        pairs = key_pairs(own, official_keys(encoder))
        fits = all(shapes.get(f"bb.{key}") == own[own_key] for key, own_key in pairs.items())
        if fits and len(own) == len([key for key in theirs if not key.endswith(DERIVED)]):
            return name
    raise UserError(f"the checkpoint's encoder (its `bb.` entries) is none of {', '.join(BACKBONES)}")


def _block_kind(keys: list[str]) -> str:
    if any(".conv_in." in key for key in keys):
        return "ResBlk" if any(".conv_resi." in key for key in keys) else "BasicDecBlk"
    return "ASPPDeformable" if any(".aspp_deforms." in key for key in keys) else "ASPP"


# Official key ↔ own key, in the order in which the official code declares them. Encoders bring their own tables.
OFFICIAL_KEYS: KeyTable = [
    ("cls_head.0", "classifier"),
    ("squeeze_module", "squeeze"),
    *((f"decoder.pyramid_neck_x{level + 1}.conv", f"decoder.neck.{level}") for level in (3, 2, 1, 0)),
    *((f"decoder.ipt_blk{5 - i}", f"decoder.stages.{i}.view") for i in range(4)),
    ("decoder.ipt_blk1", "decoder.head.view"),
    *((f"decoder.decoder_block{4 - i}", f"decoder.stages.{i}.block") for i in range(4)),
    ("decoder.conv_out1.0", "decoder.head.out"),
    *((f"decoder.lateral_block{5 - i}.conv", f"decoder.stages.{i}.lateral") for i in range(1, 4)),
    *((f"decoder.conv_ms_spvn_{4 - i}", f"decoder.stages.{i}.mask") for i in range(3)),
    *((f"decoder.gdt_convs_{4 - i}", f"decoder.stages.{i}.gate.features") for i in range(3)),
    *((f"decoder.gdt_convs_pred_{4 - i}.0", f"decoder.stages.{i}.gate.predict") for i in range(3)),
    *((f"decoder.gdt_convs_attn_{4 - i}.0", f"decoder.stages.{i}.gate.attend") for i in range(3)),
    ("refiner", "refiner"),
]
