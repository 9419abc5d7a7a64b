"""A training step's forward pass: clips, of which a user prompts some frames and corrects some."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.sam2.memory import recall
from models.sam2.parts import Features, Points, Sam2Parts, Segmentation, mask_logits, resize
from models.sam2.prompts import User

Outputs = dict[str, list[Any]]


def segment_clips(
    model: Sam2Parts, images: Tensor, truth: Tensor, clips: Tensor, user: User, maps: list[Tensor] | None = None
) -> Outputs:
    """
    Args:
        images: (B, T, 3, H, W), normalised.
        truth: (N, T, H, W) bool, the masks of all objects of all clips.
        clips: (N,) int64, the clip of each object.
        maps: of the trunk, of all frames of the first clip, then of the second …, where they are known.

    Returns:
        One entry for each time that masks were predicted, none for frames where they were given, several for frames
        with corrections: `frames`, the frame;
        `candidates` (N, M, H/4, W/4) logits of M masks, 3 or 1; `ious` (N, M), their predicted IoUs; `scores` (N, 1),
        logits of the object being there.
    """
    num_frames = images.shape[1]
    features = model.encode(images.flatten(0, 1), maps).frames(num_frames)
    plan = user.plan(num_frames)
    lasting = {*plan.conditioning, *plan.corrected}
    past: dict[int, Left] = {}
    outputs: Outputs = {"frames": [], "candidates": [], "ious": [], "scores": []}
    order = plan.conditioning + [t for t in range(num_frames) if t not in plan.conditioning]
    for t in order:
        own, masks = features[t].of(clips), truth[:, t : t + 1]
        if t in plan.conditioning and not plan.points:
            steps, result = [], model.adopt(own, masks)
        else:
            points = user.prompt(masks) if t in plan.conditioning else None
            conditioned = (
                model.without_memory(own) if points else with_past(model, own.coarse, t, past, lasting, num_frames)
            )
            clicks = user.clicks if t in plan.corrected else 0
            steps = segment_and_correct(model, conditioned, own, masks, points, user, clicks)
            result = steps[-1]
        if t != order[-1]:  # nobody remembers the last one
            large = resize(result.masks, *own.image_size) if steps else mask_logits(masks)
            past[t] = Left(model.remember(own.coarse, large, result.scores), result.pointers)
        outputs["frames"] += [t] * len(steps)
        outputs["candidates"] += [step.candidates for step in steps]
        outputs["ious"] += [step.ious for step in steps]
        outputs["scores"] += [step.scores for step in steps]
    return outputs


class Left(NamedTuple):
    """What N objects left in a frame: memories (N, 64, h, w) and pointers (N, 256)."""

    memories: Tensor
    pointers: Tensor


def segment_and_correct(
    model: Sam2Parts,
    conditioned: Tensor,
    features: Features,
    truth: Tensor,
    points: Points | None,
    user: User,
    clicks: int,
) -> list[Segmentation]:
    """The masks of a frame, and those after each of so many clicks, with the masks before it as a prompt too."""
    steps = [model.segment(conditioned, features, points, multimask=points is None or len(points) <= 1)]
    for _ in range(clicks):
        masks = steps[-1].masks
        click = user.correct(truth, resize(masks, *features.image_size) > 0)
        points = click if points is None else points.then(click)
        steps.append(model.segment(conditioned, features, points, masks, multimask=len(points) <= 1))
    return steps


def with_past(
    model: Sam2Parts, coarse: Tensor, frame: int, past: dict[int, Left], lasting: set[int], num_frames: int
) -> Tensor:
    """Features (N, 256, h, w) of a frame that remembers those that were seen before it."""
    prompted = [other for other in past if other in lasting]
    found = recall(frame, prompted, past.keys() - lasting, num_frames, future=model.training)
    pointers = [past[other].pointers for other, _ in found.pointers]
    return model.with_memory(
        coarse,
        torch.stack([past[other].memories for other, _ in found.memories], 1),
        found.moments(coarse.device),
        torch.stack(pointers, 1),
        found.steps(coarse.device),
    )
