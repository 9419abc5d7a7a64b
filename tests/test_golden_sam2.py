"""SAM 2.1 against what the official code computes from the same weights, images and prompts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.sam2.model import Points, Sam2, resize
from models.sam2.positions import sine_map
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

pytestmark = needs_shared
FOLDER = SHARED / "golden" / "sam2"
ENCODERS = ["tiny_256", "tiny_512", "small_256", "base_plus_256", "large_256"]
IMAGES = ["image_tiny_512", "image_preprocess_tiny_512"]


def read_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, expected arrays) of one case."""
    return json.loads((FOLDER / f"case_{name}.json").read_text()), dict(np.load(FOLDER / f"expected_{name}.npz"))


def weights_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """The official checkpoint of a case."""
    weights = dict(_weights(case["variant"]))
    for key, value in case.get("weight_edits", {}).items():
        weights[key] = torch.full_like(weights[key], value)
    for key, factor in case.get("weight_scale", {}).items():
        weights[key] = weights[key] * factor
    return weights


@cache
def _weights(variant: str) -> dict[str, Tensor]:
    return golden().make_state_dict(json.loads((FOLDER / f"keys_{variant}.json").read_text()))


def load(case: dict[str, Any]) -> Sam2:
    weights = weights_of(case)
    model = Sam2(**Sam2.infer_settings(weights), drop_path=0.0, dropout=0.0)
    report = model.load_official({"model": weights})
    assert len(report.loaded) == len(weights)
    assert not report.missing + report.unexpected + list(report.reshaped) + report.notes
    return model.eval()


def assert_close(value: Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """As the cases state it: relative to the largest value."""
    count = len(expected) - 3
    np.testing.assert_allclose(golden().sample(value, count), expected, rtol=0, atol=tolerance * expected[-1])


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, expected = read_case(f"encoder_{name}")
    model = load(case)
    images = golden().make_image(case["inputs"]["image"]["name"], tuple(case["inputs"]["image"]["shape"]))
    trunk = model.image_encoder.trunk
    patches = torch.zeros_like(trunk.patch_embed(images[:1]))
    assert_close(trunk._pos_embed(patches), expected["trunk_pos_embed"])
    stages = trunk.forward_intermediates(images, intermediates_only=True)
    for i, stage in enumerate(stages):
        assert_close(stage, expected[f"trunk_stage{i}"])
    monkeypatch.setattr(trunk, "forward_intermediates", lambda *_, **__: stages)  # once is enough
    for i, feature in enumerate(model.image_encoder(images)):
        assert_close(feature, expected[f"fpn{i}"])
        position = sine_map(feature.shape[-2], feature.shape[-1], 256, feature.device)
        assert_close(position.expand(len(images), -1, -1, -1), expected[f"vision_pos_enc{i}"])
    features = model.encode(images)
    assert_close(features.finest, expected["high_res_s0"])
    assert_close(features.finer, expected["high_res_s1"])


# --- prompts in an image ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> dict[str, Any]:
    """Of each image case: description, expected arrays, model, features and original size."""
    results = {}
    with torch.no_grad():
        for name in IMAGES:
            case, expected = read_case(name)
            model, (image, size) = load(case), image_of(case)
            results[name] = (case, expected, model, image, model.encode(image), size)
    return results


def image_of(case: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """(model input, (height, width) of the original) of an image case."""
    given = case["inputs"]["image"]
    if given["kind"] == "tensor":
        return golden().make_image(given["name"], tuple(given["shape"])), tuple(given["shape"][-2:])
    size = (given["height"], given["width"])
    image = (golden().make_image(given["name"], (1, 3, *size)) * 50 + 128).clamp(0, 255).to(torch.uint8)
    scaled = F.interpolate(image / 255, (case["image_size"],) * 2, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (scaled - mean) / std, size


def points_of(prompt: dict[str, Any], size: tuple[int, int], input_size: int) -> Points | None:
    """Boxes, then points, of a prompt in pixels of a picture of (height, width) `size`."""
    positions, labels = [], []
    if "box" in prompt:
        positions.append(torch.tensor(prompt["box"], dtype=torch.float32).reshape(-1, 2, 2))
        labels.append(torch.tensor([[2, 3]]).expand(len(positions[0]), -1))
    if "points" in prompt:
        positions.append(torch.tensor(prompt["points"], dtype=torch.float32)[None])
        labels.append(torch.tensor(prompt["labels"])[None])
    if not positions:
        return None
    scale = input_size / torch.tensor([size[1], size[0]])
    return Points(torch.cat(positions, 1) * scale, torch.cat(labels, 1))


PROMPTS = (
    [(name, prompt["name"]) for name in IMAGES for prompt in read_case(name)[0]["prompts"]] if SHARED.is_dir() else []
)


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
@torch.no_grad()
def test_prompts_in_an_image(name: str, prompt: str, images: dict[str, Any]) -> None:
    case, expected, model, _, features, size = images[name]
    details = next(each for each in case["prompts"] if each["name"] == prompt)
    model.mask_decoder.least_stability = 0.98 if "dynamic_multimask_via_stability" in details else 0.0
    points, masks = points_of(details, size, case["image_size"]), None
    if "mask" in details:
        mask = golden().make_mask(details["mask"]["name"], (1, 1, *features.finest.shape[-2:]))
        masks = (mask * 2 - 1) * details["mask"]["logit"]
    features = features[[0] * (1 if points is None else len(points.labels))]

    def check(part: str, value: Tensor) -> None:
        assert_close(value, expected[f"{prompt}/{part}"])

    conditioned = model.without_memory(features)
    assert_close(conditioned[:1], expected["image_embed"])
    logits, ious, tokens, scores = model.decode(conditioned, features, points, masks, details["multimask_output"])
    if points is not None:
        embedded = model.prompt_encoder.embed_points(points.positions, points.labels, features.image_size)
        check("sparse_embeddings", embedded)
    check("dense_embeddings", model.prompt_encoder.embed_masks(masks).expand_as(conditioned))
    check("low_res_logits", logits)
    check("iou_scores", ious)
    check("mask_tokens_out", tokens)
    check("object_score_logits", scores)
    check("predict_low_res_clamped", logits.clamp(-32, 32))
    original = case["inputs"]["image"].get("orig_hw", size)
    check("predict_masks_orig_res", resize(logits, *original))


@torch.no_grad()
def test_positions_and_input_of_an_image(images: dict[str, Any]) -> None:
    for case, expected, model, image, features, _ in images.values():
        assert_close(model.prompt_encoder.frequencies.grid(*features.coarse.shape[-2:]), expected["dense_pe"])
        if case["inputs"]["image"]["kind"] == "uint8":
            assert_close(image, expected["preprocessed_image"])
