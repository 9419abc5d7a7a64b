"""Objects followed through a video, of which frame after frame comes in and nothing old is kept.

tracker = Tracker(model, size=(height, width))
tracker.add_points(0, frames[0], object_id=1, points=[[310, 180]], labels=[1])
for number, ids, logits in tracker.propagate(enumerate(frames)):
    masks = resize(logits, height, width) > 0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from errors import UserError
from models.sam2.image_encoder import WIDTH
from models.sam2.memory import POINTERS, Recall, recall
from models.sam2.parts import Features, Points, Sam2Parts, Segmentation, resize
from models.sam2.prompt_encoder import BOTTOM_RIGHT, TOP_LEFT

LOGIT_LIMIT = 32.0  # of earlier masks that are given to the decoder again
FILLED = 0.1  # the logit of a filled hole


@dataclass(frozen=True)
class Seen:
    """What an object left in a frame: `masks` (1, 1, h, w) logits, `score` (1, 1), above 0 where it is there, `pointer`
    (1, 256), `memory` (1, 64, ·, ·), and in which direction of time tracking came by, if it did."""

    masks: Tensor
    score: Tensor
    pointer: Tensor
    memory: Tensor
    reverse: bool | None = None


@dataclass
class Followed:
    """One object: what it left in the frames with its prompts, and in others. Prompts `pending` wait for propagation,
    so that several clicks on a frame do not remember each other."""

    prompted: dict[int, Seen] = field(default_factory=dict)
    tracked: dict[int, Seen] = field(default_factory=dict)
    pending: dict[int, Seen] = field(default_factory=dict)
    points: dict[int, Points] = field(default_factory=dict)

    def seen(self, frame: int) -> Seen | None:
        return self.prompted.get(frame) or self.tracked.get(frame)

    def forget(self, frame: int, keep: int) -> None:
        """Drop what lies `keep` frames or more from this frame and from all prompts."""
        near = [frame, *self.prompted]
        for other in [other for other in self.tracked if all(abs(other - each) >= keep for each in near)]:
            del self.tracked[other]


class Tracker:
    """Follows any number of objects through one video; those with the same history go through the model as one batch.

    Frames are (3, H, W) tensors, normalised, in the model's input size; they are handed in and not kept. All masks are
    logits at a quarter of that size, above 0 on the object.

    Args:
        model: in evaluation mode.
        size: (height, width) of the video, in whose pixels points, boxes and masks are given.
        num_frames: of the video; None where that is not known, as of a camera. It matters below 16 frames.
        keep: frames whose memories are kept, around the present one and around those with prompts. The model looks
            back 15 frames, so fewer change the result, and more only help corrections far from all of these; a click
            on a frame that was forgotten counts as a first one.
        hole_area: holes in masks up to so many cells of a mask are filled.
        corrections_condition: prompts on frames that were tracked already are as lasting as first ones. Officially
            they are lost at the next propagation.
        stride: in time between the frames that are remembered; the last one always is.
    """

    def __init__(
        self,
        model: Sam2Parts,
        size: tuple[int, int],
        num_frames: int | None = None,
        keep: int = POINTERS,
        hole_area: int = 8,
        corrections_condition: bool = True,
        stride: int = 1,
    ) -> None:
        if model.training:
            raise RuntimeError("Tracker needs the model in evaluation mode: call model.eval() first")
        self.model, self.size, self.num_frames = model, size, num_frames
        self.keep, self.hole_area, self.stride = keep, hole_area, stride
        self.corrections_condition = corrections_condition
        self.objects: dict[int, Followed] = {}
        self._latest: tuple[int, Tensor, Features] | None = None

    # --- prompts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_points(
        self,
        frame: int,
        image: Tensor,
        object_id: int,
        points: Any = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
        more: bool = False,
    ) -> Tensor:
        """Prompt an object, new or known, in a frame; returns its mask there (1, 1, h, w).

        Args:
            points: (P, 2) x and y; `labels`: 1 on the object, 0 beside it.
            box: left, top, right, bottom.
            more: add to the points already given in this frame rather than replacing them.

        Raises `UserError` for prompts that make no sense.
        """
        features = self._encode(frame, image)
        prompt = self._scaled(parse_points(points, labels, box), features)
        followed = self.objects.get(object_id) or Followed()
        if more and frame in followed.points:
            if box is not None:
                raise UserError("a box comes before all points of its frame: give it without `more`")
            prompt = followed.points[frame].then(prompt)
        before = followed.pending.get(frame) or followed.seen(frame)
        if before is None or before.reverse is None:
            conditioned = self.model.without_memory(features)
        else:
            conditioned = self._with_memory(features, frame, [followed], before.reverse)
        masks = None if before is None else before.masks.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        result = self.model.segment(conditioned, features, prompt, masks, multimask=len(prompt) <= 1)
        followed.points[frame] = prompt
        self.objects[object_id] = followed
        return self._prompted(followed, frame, features, result)

    @torch.no_grad()
    def add_mask(self, frame: int, image: Tensor, object_id: int, mask: Tensor | np.ndarray) -> Tensor:
        """Give an object's mask (height, width) in a frame, of any type, above 0 on the object; see `add_points`."""
        features = self._encode(frame, image)
        given = torch.as_tensor(mask)
        if given.shape != torch.Size(self.size):
            raise UserError(f"a mask of shape {tuple(given.shape)} for a video of height and width {self.size}")
        given = (given > 0).to(features.coarse.device)[None, None]
        if self.size != features.image_size:
            given = resize(given, *features.image_size, antialias=True) >= 0.5
        followed = self.objects.setdefault(object_id, Followed())
        followed.points.pop(frame, None)
        return self._prompted(followed, frame, features, self.model.adopt(features, given))

    def remove(self, object_id: int) -> None:
        """Follow an object no longer."""
        del self.objects[object_id]

    def _prompted(self, followed: Followed, frame: int, features: Features, result: Segmentation) -> Tensor:
        """Keep the answer to a prompt, with its memory, until propagation."""
        masks = self._filled(result.masks)
        large = resize(masks, *features.image_size)
        memory = self.model.remember(features.coarse, large, result.scores, binary=True)
        before = followed.seen(frame)
        reverse = None if before is None else before.reverse
        followed.pending[frame] = Seen(masks, result.scores, result.pointers, memory.bfloat16(), reverse)
        return masks

    def _scaled(self, points: Points, features: Features) -> Points:
        """Pixels of the video to pixels of the input."""
        device = features.coarse.device
        (height, width), (input_height, input_width) = self.size, features.image_size
        scale = torch.tensor([input_width / width, input_height / height])
        return Points((points.positions * scale).to(device), points.labels.to(device))

    # --- propagation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propagate(
        self, frames: Iterable[tuple[int, Tensor]], reverse: bool = False
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """(number, object ids, masks (objects, 1, h, w)) of one frame after the other.

        Args:
            frames: (number, frame) in the order of time, or against it with `reverse`; the first should be one with
                prompts. Objects may be prompted and removed between two frames.

        Raises `UserError` without any object.
        """
        for frame, image in frames:
            self._settle()
            yield frame, list(self.objects), self._track(frame, image, reverse)

    def scores(self, frame: int) -> Tensor:
        """(objects,) in the order of `objects`: above 0 where an object was seen in this frame, which was tracked."""
        return torch.cat([seen.score[:, 0] for each in self.objects.values() if (seen := each.seen(frame))])

    def _settle(self) -> None:
        """Let pending prompts count."""
        if not self.objects:
            raise UserError("there is nothing to follow: add points, a box or a mask first")
        for followed in self.objects.values():
            for frame, seen in followed.pending.items():
                if self.corrections_condition or seen.reverse is None or frame in followed.prompted:
                    followed.prompted[frame] = seen
                    followed.tracked.pop(frame, None)
                else:
                    followed.tracked[frame] = seen
            followed.pending.clear()

    def _track(self, frame: int, image: Tensor, reverse: bool) -> Tensor:
        alike: dict[Recall, list[Followed]] = {}
        for followed in self.objects.values():
            if frame in followed.prompted:
                followed.prompted[frame] = replace(followed.prompted[frame], reverse=reverse)
            else:
                alike.setdefault(self._recall(followed, frame, reverse), []).append(followed)
        for group in alike.values():
            self._track_group(group, frame, self._encode(frame, image), reverse)
        for followed in self.objects.values():
            followed.forget(frame, self.keep)
        return torch.cat([seen.masks for each in self.objects.values() if (seen := each.seen(frame))])

    def _track_group(self, group: list[Followed], frame: int, features: Features, reverse: bool) -> None:
        conditioned = self._with_memory(features, frame, group, reverse)
        features = features.expand(len(group))
        result = self.model.segment(conditioned, features, multimask=True)
        large = resize(result.masks, *features.image_size)
        memory = self.model.remember(features.coarse, large, result.scores).bfloat16()
        parts = (self._filled(result.masks), result.scores, result.pointers, memory)
        each = zip(*(part.split(1) for part in parts), strict=True)
        for followed, (masks, score, pointer, own) in zip(group, each, strict=True):
            followed.tracked[frame] = Seen(masks, score, pointer, own, reverse)

    def _recall(self, followed: Followed, frame: int, reverse: bool) -> Recall:
        return recall(frame, followed.prompted, followed.tracked, self.num_frames, reverse, stride=self.stride)

    def _with_memory(self, features: Features, frame: int, group: list[Followed], reverse: bool) -> Tensor:
        """Features of a frame for objects with the same history."""
        found = self._recall(group[0], frame, reverse)
        size, device = len(group), features.coarse.device

        def gather(part: str, others: tuple[tuple[int, int], ...]) -> Tensor:
            """(objects, frames, ...) of a part of what the objects left in other frames."""
            frames = [torch.cat([getattr(followed.seen(other), part) for followed in group]) for other, _ in others]
            return torch.stack(frames, 1).to(features.coarse.dtype)

        return self.model.with_memory(
            features.coarse.expand(size, -1, -1, -1),
            gather("memory", found.memories),
            found.moments(device),
            gather("pointer", found.pointers) if found.pointers else torch.zeros(size, 0, WIDTH, device=device),
            found.steps(device),
        )

    def _encode(self, frame: int, image: Tensor) -> Features:
        """Features of a frame; of the latest one they are kept, since prompts come several to a frame."""
        if self._latest is None or self._latest[0] != frame or self._latest[1] is not image:
            device = self.model.prompt_encoder.no_mask.weight.device
            self._latest = (frame, image, self.model.encode(image.to(device)[None]))
        return self._latest[2]

    def _filled(self, masks: Tensor) -> Tensor:
        return fill_holes(masks, self.hole_area) if self.hole_area else masks


def parse_points(points: Any, labels: Sequence[int], box: Sequence[float] | None) -> Points:
    """The corners of a box, then points, as one prompt of one object. Raises `UserError` for what is none."""
    positions = torch.as_tensor(np.asarray(points, np.float32)).reshape(-1, 2)
    if len(positions) != len(labels) or any(label not in (0, 1) for label in labels):
        raise UserError(f"{len(positions)} points have {len(labels)} labels: each needs one, 1 (object) or 0 (not)")
    corners = torch.zeros(0, 2)
    if box is not None:
        left, top, right, bottom = box
        if not (left <= right and top <= bottom):
            raise UserError(f"the box {list(box)} is none: it needs left, top, right, bottom")
        corners = torch.tensor([[left, top], [right, bottom]], dtype=torch.float32)
    positions = torch.cat((corners, positions))
    if not len(positions) or not positions.isfinite().all():
        raise UserError("a prompt needs a point or a box, with finite numbers")
    kinds = [TOP_LEFT, BOTTOM_RIGHT][: len(corners)] + list(labels)
    return Points(positions[None], torch.tensor(kinds)[None])


def fill_holes(masks: Tensor, area: int) -> Tensor:
    """Masks (B, 1, h, w) in which background areas of at most `area` cells, corners connecting, became object."""
    holes = np.zeros(tuple(masks.shape), bool)
    for hole, background in zip(holes[:, 0], (masks[:, 0] <= 0).cpu().numpy(), strict=True):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(background.astype(np.uint8), connectivity=8)
        small = stats[:, cv2.CC_STAT_AREA] <= area
        small[0] = False  # the object itself
        hole[:] = small[labels]
    return masks.masked_fill(torch.from_numpy(holes).to(masks.device), FILLED)
