"""SAM 2.1 as the programs use it: training, evaluation, official weights, graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError, nearest
from models.base import KeyTable, LoadReport, unwrap
from models.sam2.feature_cache import FeatureCache
from models.sam2.graphs import Graph, graphs_of
from models.sam2.hiera import stages
from models.sam2.image_encoder import TRUNKS
from models.sam2.parts import ABSENT, Points, Sam2Parts
from models.sam2.prompt_encoder import POSITIVE
from models.sam2.prompts import RandomUser, boxes_around, center_clicks
from models.sam2.tracker import Tracker
from models.sam2.training import segment_clips
from samples import Masklets

OFFICIAL_WEIGHTS = "https://dl.fbaipublicfiles.com/segment_anything_2/092824"
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder", "memory_attention", "memory_encoder", "object_pointers")


class Sam2(Sam2Parts):
    """Masks of prompted objects in clips and images, of any size whose sides are multiples of 32.

    Batches have `images` (B, T, 3, H, W) and `targets` with `masks` (N, T, H, W), above 0 on each of the N objects of
    all clips, and `clips` (N,) int64, the clip that each is in. Prompts are drawn from these masks.

    The outputs are those of `segment_clips`. In evaluation, where `images` are `streams.Streams` of clips of any
    length, `predict` prompts each object once, in the first frame that shows it, and follows it to the end of its
    clip: `logits`, −1024 where it is held to be absent and before its first frame, and `scores`, above 0 where it is
    held to be present.

    Images alone, (B, 3, H, W), are segmented as if someone clicked in their middle: `logits` (B, 3, H/4, W/4), `ious`
    (B, 3) and `scores` (B, 1). Prompts of a person go to `Tracker`, or to `without_memory` and `decode`.

    Args:
        variant: "tiny", "small", "base_plus" or "large".
        trainable: the parts to train, of `PARTS`; none named: all.
        drop_path: stochastic depth of the image encoder.
        dropout: of the memory attention.
        point_prompts, box_prompts, conditioning_frames, corrected_frames, correction_clicks, true_clicks: what the user
            does in training, see `RandomUser`.
        evaluation_prompt: "mask", "click" (in the middle of the object) or "box".
    """

    encoder = "image_encoder."
    skips_parameters = True  # those of prompts that a step does not draw, and one that the official code never reads
    graph_size = (1024, 1024)  # height and width of the images that exported graphs take

    def __init__(
        self,
        variant: str = "tiny",
        trainable: Sequence[str] = (),
        drop_path: float = 0.1,
        dropout: float = 0.1,
        point_prompts: float = 0.5,
        box_prompts: float = 0.5,
        conditioning_frames: int = 2,
        corrected_frames: int = 2,
        correction_clicks: int = 7,
        true_clicks: float = 0.1,
        evaluation_prompt: Literal["mask", "click", "box"] = "mask",
    ) -> None:
        """Raises `UserError` for an unknown variant or part."""
        if variant not in TRUNKS:
            raise UserError(
                f"model.variant: there is no {variant!r}{nearest(variant, TRUNKS)}; known: {', '.join(TRUNKS)}"
            )
        for part in trainable:
            if part not in PARTS:
                raise UserError(
                    f"model.trainable: there is no {part!r}{nearest(part, PARTS)}; known: {', '.join(PARTS)}"
                )
        super().__init__(variant, dropout)
        self.variant, self.evaluation_prompt = variant, evaluation_prompt
        self.feature_cache: FeatureCache | None = None
        self.user = RandomUser(
            point_prompts, box_prompts, conditioning_frames, corrected_frames, correction_clicks, true_clicks
        )
        self.set_drop_path(drop_path)
        for part in PARTS if trainable else ():
            self.get_submodule(part).requires_grad_(part in trainable)

    def forward(self, batch: Any) -> dict[str, Any]:
        images: Tensor = getattr(batch, "images", batch)
        if images.ndim == 4:
            return self.segment_middle(images)
        maps = self.kept_maps(batch, self.feature_cache) if self.feature_cache else None
        return segment_clips(self, images, batch.targets.masks > 0, batch.targets.clips, self.user, maps)

    def segment_middle(self, images: Tensor) -> dict[str, Tensor]:
        """Three masks for a click in the middle of each image (B, 3, H, W)."""
        features = self.encode(images)
        height, width = images.shape[-2:]
        x = torch.full((len(images), 1), width / 2, device=images.device)
        points = Points(torch.stack((x, torch.full_like(x, height / 2)), -1), torch.full_like(x, POSITIVE))
        logits, ious, _, scores = self.decode(self.without_memory(features), features, points, multimask=True)
        return {"logits": logits, "ious": ious, "scores": scores}

    @torch.no_grad()
    def predict(self, batch: Any) -> dict[str, Any]:
        """As in `Model`; for clips that are streamed `logits` [(n, T, H/4, W/4)], `scores` [(n, T)], both float32 on
        the host, and `prompted` [[n]], the frames in which the objects were prompted, -1 for none: an entry a clip."""
        if isinstance(batch, Tensor) or isinstance(batch.images, Tensor):
            return super().predict(batch)
        found: dict[str, list[Any]] = {"logits": [], "scores": [], "prompted": []}
        for frames, masklets, sample in zip(batch.images, batch.targets.originals, batch.samples, strict=True):
            for name, value in self.follow(frames, masklets, sample.size).items():
                found[name].append(value)
        return found

    def follow(self, frames: Iterable[Tensor], masklets: Masklets, size: tuple[int, int]) -> dict[str, Any]:
        """Masks of a clip's objects, each prompted once and followed; see `predict`."""
        num_objects, num_frames = len(masklets.object_ids), len(masklets.annotated)
        tracker = Tracker(self, size, num_frames)
        prompted, scores = [-1] * num_objects, torch.full((num_objects, num_frames), ABSENT)
        logits: Tensor | None = None
        for t, frame in enumerate(frames):
            new = [number for number in masklets.visible(t) if prompted[number] < 0] if masklets.annotated[t] else []
            for number, mask in zip(new, masklets.masks(t, new) if new else (), strict=True):
                prompted[number] = t
                self.prompt_once(tracker, t, frame, number, mask)
            if logits is None:
                height, width = frame.shape[-2:]
                logits = torch.full((num_objects, num_frames, height // 4, width // 4), ABSENT)
            for _, numbers, masks in tracker.propagate([(t, frame)] if tracker.objects else []):
                logits[numbers, t] = masks[:, 0].float().cpu()
                scores[numbers, t] = tracker.scores(t).float().cpu()
        return {"logits": logits, "scores": scores, "prompted": prompted}

    def prompt_once(self, tracker: Tracker, frame: int, image: Tensor, number: int, mask: np.ndarray) -> None:
        """Prompt an object, as the settings say, from its true mask (H, W) bool at the clip's own size."""
        truth = torch.from_numpy(mask)[None, None]
        if self.evaluation_prompt == "mask":
            tracker.add_mask(frame, image, number, mask)
        elif self.evaluation_prompt == "box":
            tracker.add_points(frame, image, number, box=(boxes_around(truth)[0]).tolist())
        else:
            click = center_clicks(truth, torch.zeros_like(truth))
            tracker.add_points(frame, image, number, click.positions[0].tolist(), click.labels[0].tolist())

    # --- training -------------------------------------------------------------------------------------------------

    def keep_features(self, gigabytes: float) -> None:
        """From now on keep what the trunk makes of training frames, in so much of the host's memory. Frames are known
        by their clip, number and size: nothing may change their pixels. Raises `UserError` for a trunk that trains."""
        if any(parameter.requires_grad for parameter in self.image_encoder.parameters()):
            raise UserError(
                "train.cache_features: the image encoder trains, so its features change in every step; name other "
                "parts in model.trainable"
            )
        self.feature_cache = FeatureCache(int(gigabytes * 1e9))
        self.train(self.training)

    def kept_maps(self, batch: Any, cache: FeatureCache) -> list[Tensor]:
        """The trunk's maps of all frames of a training batch."""
        keys = [(sample.sample_id, number) for sample in batch.samples for number in sample.frames]
        return cache(partial(stages, self.image_encoder.trunk), batch.images.flatten(0, 1), keys)

    def train(self, mode: bool = True) -> Sam2:
        """As in `Model`; a trunk whose features are kept has no stochastic depth."""
        super().train(mode)
        if self.feature_cache is not None:
            self.image_encoder.eval()
        return self

    def decays(self, name: str) -> bool:
        """As official: all but biases and the norms of transformers."""
        module = self.get_submodule(name.rpartition(".")[0])
        return "bias" not in name and not isinstance(module, nn.LayerNorm)

    def layer_depth(self, name: str) -> tuple[int, int]:
        """As official: the tables of positions and the neck learn as fast as the last block's output."""
        total = len(self.image_encoder.trunk.blocks) + 1
        part = name.removeprefix("image_encoder.trunk.").split(".")
        if part[0] == "blocks":
            return int(part[1]) + 1, total
        return (0 if part[0] == "patch_embed" else total), total

    # --- export ---------------------------------------------------------------------------------------------------

    def export_graphs(self) -> dict[str, Graph]:
        """The four graphs of `models.sam2.graphs`, for images of `graph_size`."""
        return graphs_of(self, *self.graph_size)

    # --- official checkpoints -------------------------------------------------------------------------------------

    def published_weights(self) -> dict[str, str]:
        """Addresses of the trunk alone, as timm keeps it, and of the whole model."""
        side = 1024 if self.variant == "large" else 896
        return {
            "backbone": f"hf-hub:timm/{TRUNKS[self.variant].name}.fb_r{side}_2pt1",
            "official": f"{OFFICIAL_WEIGHTS}/sam2.1_hiera_{self.variant}.pt",
        }

    def official_keys(self) -> KeyTable:
        parts: list[tuple[str, str, KeyTable]] = [
            ("image_encoder", "image_encoder", self.image_encoder.official_keys()),
            ("", "object_pointers", [("mask_downsample", "mask_downsample")]),
            ("memory_attention", "memory_attention", self.memory_attention.official_keys()),
            ("memory_encoder", "memory_encoder", self.memory_encoder.official_keys()),
            ("sam_prompt_encoder", "prompt_encoder", self.prompt_encoder.official_keys()),
            ("sam_mask_decoder", "mask_decoder", self.mask_decoder.official_keys()),
            ("", "object_pointers", [("obj_ptr_proj", "project"), ("obj_ptr_tpos_proj", "position")]),
        ]
        table = list(LOOSE_KEYS)
        for official, own, keys in parts:
            table += [(f"{official}.{key}".lstrip("."), f"{own}.{name}") for key, name in keys]
        return table

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """As in `Model`. SAM 2.0 lacks two codes, and computes as if they were 0: they become that, and can be
        trained."""
        theirs = unwrap(state_dict)
        report = self.load_tensors(theirs, self.official_keys())
        if len(report.loaded) > len(report.missing) and set(report.missing) == set(ONLY_IN_2_1):
            own = {**self.object_pointers.position.state_dict(), "no_object": self.memory_encoder.no_object.data}
            for tensor in own.values():
                tensor.zero_()
            report.notes.append(
                "these are weights of SAM 2.0, which does not tell how old an object's pointer is nor "
                f"remembers that an object was absent: {', '.join(report.missing)} start from 0"
            )
            report.missing = []
        return report

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load the image encoder alone, from a whole checkpoint or from the trunk as timm keeps it."""
        trunk = "image_encoder.trunk."
        renamed = {}
        for key, tensor in unwrap(state_dict).items():
            if key.startswith(("blocks.", "patch_embed.", "pos_embed")):
                key = trunk + key.replace(".mlp.fc1.", ".mlp.layers.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
            if key.startswith(self.encoder):
                renamed[key] = tensor
        report = self.load_tensors(renamed, self.official_keys())
        report.missing = [key for key in report.missing if key.startswith(trunk)]
        return report

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an official checkpoint of SAM 2.0 or 2.1. Raises `UserError` for what is none."""
        theirs = unwrap(state_dict)
        first = "image_encoder.trunk.patch_embed.proj.weight"
        if first not in theirs or "sam_mask_decoder.mask_tokens.weight" not in theirs:
            raise UserError(f"the checkpoint is no whole SAM 2: it lacks {first} or the mask decoder")
        prefix = "image_encoder.trunk.blocks."
        blocks = len({key[len(prefix) :].split(".")[0] for key in theirs if key.startswith(prefix)})
        width = theirs[first].shape[0]
        for name, row in TRUNKS.items():
            if (row.width, row.blocks) == (width, blocks):
                return {"variant": name}
        raise UserError(f"the checkpoint's trunk, {width} wide with {blocks} blocks, is none of {', '.join(TRUNKS)}")


LOOSE_KEYS: KeyTable = [
    ("maskmem_tpos_enc", "memory_attention.moments"),
    ("no_mem_embed", "memory_attention.no_memory"),
    ("no_mem_pos_enc", "memory_attention.no_memory_position"),
    ("no_obj_ptr", "object_pointers.no_object"),
    ("no_obj_embed_spatial", "memory_encoder.no_object"),
]
ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
