"""SegFormer: a class for each pixel from a hierarchical transformer and an all-MLP head (Xie et al., 2021,
arXiv:2105.15203).

The encoder overlaps its patches, reduces the keys of its attention and needs no position codes, so it takes any image
size. The head brings the four maps to one size and width and fuses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, nearest
from models.backbones import block_depths
from models.backbones.library import mix_transformer
from models.base import KeyTable, LoadReport, Logits, Model, unwrap
from models.linear import pointwise

SHORTEST_SIDE = 29  # of an image: below it the first stage's map is smaller than the patches of its keys

HUGGING_FACE_EPS, NVLABS_EPS = 1e-5, 1e-6  # of the norms of blocks and stages in the code of each


@dataclass(frozen=True)
class Variant:
    """A size of the encoder, and the head's width that goes with it."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    head: int
    ade20k: str = "512-512"  # the crop that the weights published for ADE20K were trained on


WIDE = (64, 128, 320, 512)
VARIANTS = {
    "b0": Variant((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": Variant(WIDE, (2, 2, 2, 2), 256),
    "b2": Variant(WIDE, (3, 4, 6, 3), 768),
    "b3": Variant(WIDE, (3, 4, 18, 3), 768),
    "b4": Variant(WIDE, (3, 8, 27, 3), 768),
    "b5": Variant(WIDE, (3, 6, 40, 3), 768, "640-640"),
}


class SegFormer(Model):
    """`logits` (B, classes, H/4, W/4), sides rounded up, of images with sides of 29 pixels and more.

    The stride is what training sizes should be multiples of, so that no stage sees a fraction of a patch.

    Args:
        variant: "b0" to "b5".
        num_classes: at least 1.
        drop_path: stochastic depth of the encoder.
        dropout: of whole channels before the classifier, as in NVlabs' code; Hugging Face's drops single values.
        norm_eps: of the norms of blocks and stages: 1e-5 in Hugging Face's code, 1e-6 in NVlabs'. Their logits differ
            by 1e-5. `infer_settings` tells from a checkpoint's layout, and `load_official` says where it differs.
    """

    stride = 32
    encoder = "backbone."

    def __init__(
        self,
        variant: str = "b0",
        num_classes: int = 0,
        drop_path: float = 0.1,
        dropout: float = 0.1,
        norm_eps: float = HUGGING_FACE_EPS,
    ) -> None:
        """Raises `UserError` for an unknown variant, and without classes."""
        super().__init__()
        if variant not in VARIANTS:
            raise UserError(
                f"model.variant: there is no {variant!r}{nearest(variant, VARIANTS)}; known: {', '.join(VARIANTS)}"
            )
        if num_classes < 1:
            raise UserError("model.num_classes is 0, which stands for the classes of the data, but there is no data")
        row = VARIANTS[variant]
        self.variant, self.norm_eps = variant, norm_eps
        # Built with some stochastic depth whatever the rate, so that a schedule can raise it later.
        self.backbone = mix_transformer(row.widths, row.depths, 0.1, norm_eps)
        self.set_drop_path(drop_path)
        self.head = Head(row.widths, row.head, num_classes, dropout)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        images: Tensor = getattr(batch, "images", batch)
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and min(height, width) < SHORTEST_SIDE:
            raise UserError(f"an input of {width}×{height} pixels: SegFormer needs sides of at least {SHORTEST_SIDE}")
        return {"logits": self.head(self.backbone(images))}

    def layer_depth(self, name: str) -> tuple[int, int]:
        depths, total = self._encoder_depths
        return depths.get(name, total), total

    @cached_property
    def _encoder_depths(self) -> tuple[dict[str, int], int]:
        return block_depths([name for name, _ in self.named_parameters() if name.startswith(self.encoder)])

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """One graph: normalised `images` (B, 3, H, W) → `logits` (B, classes, H/4, W/4)."""
        axes = {
            "images": {0: "batch", 2: "height", 3: "width"},
            "logits": {0: "batch", 2: "logits_height", 3: "logits_width"},
        }
        return {"segformer": (Logits(self), (torch.zeros(2, 3, 256, 256),), axes)}

    def published_weights(self) -> dict[str, str]:
        """Addresses of the encoder trained on ImageNet and of the whole model trained on ADE20K (150 classes)."""
        crop = VARIANTS[self.variant].ade20k
        return {
            "backbone": f"hf-hub:nvidia/mit-{self.variant}",
            "official": f"hf-hub:nvidia/segformer-{self.variant}-finetuned-ade-{crop}",
        }

    # --- official checkpoints -------------------------------------------------------------------------------------

    def official_keys(self) -> KeyTable:
        """Of Hugging Face's layout, as it is in files."""
        return hugging_face_keys(VARIANTS[self.variant].depths)

    def official_part(self, key: str, tensor: Tensor) -> Tensor:
        """Hugging Face keeps keys and values apart, which are the two halves of one matrix here."""
        if ".self.key." in key:
            return tensor.chunk(2)[0]
        return tensor.chunk(2)[1] if ".self.value." in key else tensor

    def ignores(self, key: str) -> bool:
        """A head that NVlabs' code declares and never uses, and the ImageNet classifiers of encoders."""
        return key.startswith(("decode_head.conv_seg.", "classifier.", "head."))

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """As in `Model`, from a file of Hugging Face's or NVlabs' layout, of a whole model or of an encoder alone."""
        theirs = unwrap(state_dict)
        if is_nvlabs(theirs):
            report = self.load_tensors(with_backbone(theirs), nvlabs_keys(self.backbone.official_keys()))
            origin, eps = "NVlabs", NVLABS_EPS
        else:
            report = self.load_tensors(theirs, self.official_keys())
            origin, eps = "Hugging Face", HUGGING_FACE_EPS
        if report.loaded and eps != self.norm_eps:
            report.notes.append(
                f"{origin}'s code has norms with ε {eps:g}, this model's model.norm_eps is {self.norm_eps:g}"
            )
        return report

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load the encoder alone, from the weights that were trained on ImageNet."""
        report = self.load_official(state_dict)
        report.missing = [key for key in report.missing if not key.startswith("decode_head.")]
        return report

    def official_state_dict(self, layout: str = "huggingface") -> dict[str, Tensor]:
        """This model's weights under the official keys, in the official order; `layout`: "huggingface" or "nvlabs"."""
        tables = {"huggingface": self.official_keys(), "nvlabs": nvlabs_keys(self.backbone.official_keys())}
        if layout not in tables:
            raise UserError(f"there is no layout {layout!r}{nearest(layout, tables)}; known: {', '.join(tables)}")
        return self.save_tensors(tables[layout])

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an official checkpoint of either layout. Raises `UserError` for what is none, or for an
        encoder without a head."""
        theirs = unwrap(state_dict)
        nvlabs = is_nvlabs(theirs)
        first = "backbone.patch_embed1.proj.weight" if nvlabs else "segformer.encoder.patch_embeddings.0.proj.weight"
        classifier = "decode_head.linear_pred.weight" if nvlabs else "decode_head.classifier.weight"
        if first not in theirs or classifier not in theirs:
            raise UserError(f"the checkpoint is no whole SegFormer: it lacks {first} or {classifier}")
        stages = [f"backbone.block{i + 1}." if nvlabs else f"segformer.encoder.block.{i}." for i in range(4)]
        depths = tuple(
            len({key[len(stage) :].split(".")[0] for key in theirs if key.startswith(stage)}) for stage in stages
        )
        for name, row in VARIANTS.items():
            if (row.widths[0], row.depths) == (theirs[first].shape[0], depths):
                eps = NVLABS_EPS if nvlabs else HUGGING_FACE_EPS
                return {"variant": name, "num_classes": theirs[classifier].shape[0], "norm_eps": eps}
        raise UserError(
            f"the checkpoint's encoder, with {depths} blocks in its stages, is none of {', '.join(VARIANTS)}"
        )


class Head(nn.Module):
    """Four maps, fine to coarse, to logits at the finest one's size.

    Officially each map is projected to the head's width and upsampled, all are joined, and a 1×1 convolution fuses
    them. All of that is linear, so each projection is multiplied with its part of the fusion first: one product at the
    map's own size, and sums instead of a map of four times the width. Channels come last throughout.
    """

    def __init__(self, channels: tuple[int, ...], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(each, width) for each in channels)
        self.fuse = nn.Conv2d(len(channels) * width, width, 1, bias=False)  # its input lies coarse to fine
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = F.relu(self.norm(self.join(features)), inplace=True)
        return pointwise(self.dropout(x), self.classify.weight.flatten(1), self.classify.bias)

    def join(self, features: list[Tensor]) -> Tensor:
        """(B, width, H/4, W/4): what the fusion's convolution gives."""
        fusion = self.fuse.weight.flatten(1)
        weights, biases = zip(*((linear.weight, linear.bias) for linear in self.project), strict=True)
        parts = reversed(fusion.chunk(len(features), 1))
        finest, *others = [part @ weight for part, weight in zip(parts, weights, strict=True)]
        total = pointwise(features[0], finest, fusion @ torch.cat(biases[::-1]))
        for feature, weight in zip(features[1:], others, strict=True):
            total = F.interpolate(pointwise(feature, weight), total.shape[-2:], mode="bilinear").add_(total)
        return total


# --- layouts ----------------------------------------------------------------------------------------------------------


def is_nvlabs(tensors: Iterable[str]) -> bool:
    """Whether the names are those of NVlabs' code, of a whole model or of an encoder."""
    return any(key.removeprefix("backbone.").startswith("patch_embed1.") for key in tensors)


def with_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NVlabs' names as in whole models: those of encoders alone lack `backbone.`."""
    parts = ("patch_embed", "block", "norm")
    return {f"backbone.{key}" if key.startswith(parts) else key: tensor for key, tensor in tensors.items()}


def hugging_face_keys(depths: tuple[int, ...]) -> KeyTable:
    """Hugging Face's names, in their order, and this model's."""
    embeds = ["backbone.patch_embed", *(f"backbone.stages.{i}.downsample" for i in range(1, 4))]
    encoder: KeyTable = []
    for i, embed in enumerate(embeds):
        encoder += [
            (f"patch_embeddings.{i}.proj", f"{embed}.proj"),
            (f"patch_embeddings.{i}.layer_norm", f"{embed}.norm"),
        ]
    for i, depth in enumerate(depths):
        for j in range(depth):
            encoder += [(f"block.{i}.{j}.{key}", f"backbone.stages.{i}.blocks.{j}.{own}") for key, own in BLOCK_KEYS]
    encoder += [(f"layer_norm.{i}", f"backbone.stages.{i}.norm") for i in range(4)]
    head = [(f"linear_c.{i}.proj", f"head.project.{i}") for i in range(4)]
    head += [("linear_fuse", "head.fuse"), ("batch_norm", "head.norm"), ("classifier", "head.classify")]
    return [(f"segformer.encoder.{key}", own) for key, own in encoder] + [
        (f"decode_head.{key}", own) for key, own in head
    ]


BLOCK_KEYS: KeyTable = [
    ("layer_norm_1", "norm1"),
    ("attention.self.query", "attn.q"),
    ("attention.self.key", "attn.kv"),
    ("attention.self.value", "attn.kv"),
    ("attention.self.sr", "attn.sr"),
    ("attention.self.layer_norm", "attn.norm"),
    ("attention.output.dense", "attn.proj"),
    ("layer_norm_2", "norm2"),
    ("mlp.dense1", "mlp.fc1"),
    ("mlp.dwconv.dwconv", "mlp.dwconv"),
    ("mlp.dense2", "mlp.fc2"),
]


def nvlabs_keys(encoder: KeyTable) -> KeyTable:
    """NVlabs' names, in their order, and this model's; its encoder is named as PVT v2 is."""
    table = [(f"backbone.{key}", f"backbone.{own}") for key, own in encoder]
    table += [(f"decode_head.linear_c{i + 1}.proj", f"head.project.{i}") for i in (3, 2, 1, 0)]
    table += [("decode_head.linear_fuse.conv", "head.fuse"), ("decode_head.linear_fuse.bn", "head.norm")]
    return [*table, ("decode_head.linear_pred", "head.classify")]
