"""SAM 2.1 against what the official code computes from the same weights, images and prompts."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model, infer_settings
from models.base import key_pairs
from models.sam2.hiera import stages
from models.sam2.mask_decoder import take
from models.sam2.model import Sam2
from models.sam2.parts import Points, mask_logits, resize
from models.sam2.positions import sine_map
from models.sam2.prompts import Plan, center_clicks
from models.sam2.tracker import Tracker
from models.sam2.training import segment_clips
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden
from video_loss import VideoCriterion

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
    model = create_model("sam2", **infer_settings("sam2", weights), drop_path=0.0, dropout=0.0)
    assert isinstance(model, Sam2)
    report = model.load_official({"model": weights})
    assert len(report.loaded) == len(weights)
    assert not report.missing + report.unexpected + list(report.reshaped) + report.notes
    return model.eval()


def assert_close(value: Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """As the cases state it: relative to the largest value, which is below 1e-5 in one loss of exact masks alone."""
    count, largest = len(expected) - 3, max(expected[-1], 1e-5)
    np.testing.assert_allclose(golden().sample(value, count), expected, rtol=0, atol=tolerance * largest)


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
    maps = stages(trunk, images)
    for i, stage in enumerate(maps):
        assert_close(stage.permute(0, 3, 1, 2), expected[f"trunk_stage{i}"])
    monkeypatch.setattr("models.sam2.image_encoder.stages", lambda *_: maps)  # once is enough
    unchanged: Any = nn.Conv2d(256, 256, 1)
    nn.init.dirac_(unchanged.weight)
    nn.init.zeros_(unchanged.bias)
    for i, feature in enumerate(model.image_encoder(images, unchanged, unchanged)):
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
    features = features.expand(1 if points is None else len(points.labels))

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


# --- videos -----------------------------------------------------------------------------------------------------------

VIDEOS = sorted(path.stem.removeprefix("case_") for path in FOLDER.glob("case_video_*.json")) if SHARED.is_dir() else []


class Recorder:
    """The inputs and the output of memory attention, as the official code arranges them: the sequence first."""

    def __init__(self, model: Sam2) -> None:
        self.seen: dict[str, Tensor] = {}
        model.memory_attention.register_forward_hook(self.record)

    def record(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features, memories, moments, pointers, codes = inputs
        height, width = features.shape[-2:]
        place = sine_map(height, width, 64, features.device).flatten(1).mT
        positions = torch.cat(((place + module.moments[moments - 1, 0]).flatten(0, 1), codes))
        memory = torch.cat((memories.flatten(3).mT.flatten(1, 2), pointers), 1).transpose(0, 1)
        self.seen = {
            "memory": memory,
            "memory_pos": positions[:, None],
            "num_obj_ptr_tokens": torch.tensor(float(len(codes))),
            "memory_obj_ptr_tokens": memory[len(memory) - len(codes) :],
            "memory_obj_ptr_pos": codes[:, None],
            "memory_attention_out": output.flatten(2).permute(2, 0, 1),
        }


def tolerance_of(case: str, part: str, number: int, first: int) -> float:
    """README.md of the goldens: memories are bfloat16, and sharp attention amplifies noise from frame to frame.

    What attention makes of memories is not listed there. The official code itself moves by 4.7e-4 with another
    attention kernel, since that lets roundings of memories flip; the masks stay within 1e-4.
    """
    tolerance = 1e-2 if part.endswith(("maskmem_features", "/memory")) else 1e-4
    if part.endswith("memory_attention_out"):
        tolerance = 1e-3
    if "sharp" in case and number != first:
        return max(tolerance, 2e-3 if number == first + 1 else 2e-2)
    return tolerance


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_videos(name: str) -> None:
    case, expected = read_case(name)
    model = load(case)
    recorder = Recorder(model)
    given = case["inputs"]["frames"]
    shape, size = (1, 3, given["size"], given["size"]), (given["video_height"], given["video_width"])
    base = 0.8 * golden().make_image(f"{given['name']}/base", shape)[0]
    names = [f"{given['name']}/frame{t}" for t in range(given["num_frames"])]
    frames = [base + 0.2 * golden().make_image(each, shape)[0] for each in names]
    asked = case["config_overrides"].get("add_all_frames_to_correct_as_cond", False)
    tracker = Tracker(model, size, len(frames), hole_area=0, corrections_condition=asked)
    first = case["actions"][0]["frame_idx"]
    checked = set()

    def check(key: str, value: Tensor, number: int) -> None:
        assert_close(value, expected[key], tolerance_of(name, key, number, first))
        checked.add(key)

    for i, action in enumerate(case["actions"]):
        if action["op"] == "propagate":
            reverse = action.get("reverse", False)
            start = action.get("start_frame_idx", first)
            numbers = range(start, -1, -1) if reverse else range(start, len(frames))
            for number, ids, masks in tracker.propagate(((n, frames[n]) for n in numbers), reverse):
                at = f"a{i}_propagate/frame{number}"
                check(f"{at}/video_res_masks", resize(masks, *size), number)
                for each in ids:
                    seen = tracker.objects[each].seen(number)
                    check(f"{at}/obj{each}/pred_masks", seen.masks, number)
                    check(f"{at}/obj{each}/object_score_logits", seen.score, number)
                    check(f"{at}/obj{each}/obj_ptr", seen.pointer, number)
                    check(f"{at}/obj{each}/maskmem_features", seen.memory.float(), number)
                if number in action.get("record_memory_attention_on", []):
                    for part, value in recorder.seen.items():
                        check(f"{at}/{part}", value, number)
            continue
        number, each = action["frame_idx"], action["obj_id"]
        if action["op"] == "add_mask":
            mask = golden().make_mask(action["mask"]["name"], (1, 1, *size))[0, 0].bool()
            masks = tracker.add_mask(number, frames[number], each, mask)
        else:
            points, labels, more = action.get("points", ()), action.get("labels", ()), "clear_old_points" in action
            masks = tracker.add_points(number, frames[number], each, points, labels, action.get("box"), more)
        check(f"a{i}_{action['op'].removesuffix('_or_box')}/video_res_masks", resize(masks, *size), number)
    assert checked == set(expected)


# --- training ---------------------------------------------------------------------------------------------------------

TRAINING = (
    sorted(path.stem.removeprefix("case_") for path in FOLDER.glob("case_train_*.json")) if SHARED.is_dir() else []
)
TERMS = {"focal": "loss_mask", "dice": "loss_dice", "iou": "loss_iou", "object": "loss_class"}
WEIGHTS = {"focal": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0}


class Replay:
    """A user who prompts as was recorded, and in the end has done all of it."""

    def __init__(self, case: dict[str, Any]) -> None:
        result = case["result_info"]
        plan = result["prompt_plan"]
        self._plan = Plan(plan["use_pt_input"], plan["init_cond_frames"], plan["frames_to_add_correction_pt"])
        self.calls = iter(result["recorded_sampler_calls_in_order"])
        self.clicks = case["config_overrides"]["num_correction_pt_per_frame"]
        self.centers = case["mode"] == "eval"

    def plan(self, num_frames: int) -> Plan:
        return self._plan

    def prompt(self, truth: Tensor) -> Points:
        return self.correct(truth, torch.zeros_like(truth))

    def correct(self, truth: Tensor, predicted: Tensor) -> Points:
        call = next(self.calls)
        points = Points(torch.tensor(call["coords"]), torch.tensor(call["labels"]))
        if self.centers:
            drawn = center_clicks(truth, predicted)
            assert torch.equal(drawn.positions, points.positions)
            assert torch.equal(drawn.labels, points.labels)
        return points


def clips_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(images (B, T, 3, S, S), truth (N, T, S, S), clips (N,)) of a training case."""
    given, side = case["inputs"], case["image_size"]
    frames, objects = range(given["num_frames"]), given["objects"]

    def image(video: int, name: str) -> Tensor:
        return golden().make_image(f"{given['name']}/video{video}/{name}", (1, 3, side, side))[0]

    def mask(number: int, t: int) -> Tensor:
        there = t not in objects[number].get("absent", ())
        return golden().make_mask(f"{given['name']}/obj{number}/frame{t}", (1, 1, side, side), 0.3)[0, 0] * there

    videos = range(given["num_videos"])
    images = [torch.stack([0.8 * image(v, "base") + 0.2 * image(v, f"frame{t}") for t in frames]) for v in videos]
    truth = [torch.stack([mask(number, t) for t in frames]) for number in range(len(objects))]
    return torch.stack(images), torch.stack(truth).bool(), torch.tensor([each["video"] for each in objects])


def record(model: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a method of the model will have returned."""
    results: list[Any] = []
    original = getattr(model, method)

    def recorded(*inputs: Any) -> Any:
        results.append(original(*inputs))
        return results[-1]

    monkeypatch.setattr(model, method, recorded)
    return results


@torch.no_grad()
def last_memory(model: Sam2, images: Tensor, clips: Tensor, outputs: dict[str, list[Any]]) -> Tensor:
    """What the frame that was segmented last would leave in memory; training does not ask, since none comes after."""
    best = outputs["ious"][-1].argmax(1, keepdim=True)
    masks = resize(take(outputs["candidates"][-1], best), *images.shape[-2:])
    coarse = model.encode(images[:, outputs["frames"][-1]]).of(clips).coarse
    return model.remember(coarse, masks, outputs["scores"][-1])


@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, expected = read_case(name)
    model = load(case)
    model.train(case["mode"] == "train")
    model.mask_decoder.least_stability = 0.0
    images, truth, clips = clips_of(case)
    memories, adopted = record(model, "remember", monkeypatch), record(model, "adopt", monkeypatch)
    user = Replay(case)
    outputs = segment_clips(model, images, truth, clips, user)
    assert next(user.calls, None) is None

    batch: Any = SimpleNamespace(targets=SimpleNamespace(masks=truth))
    criterion = VideoCriterion(WEIGHTS)
    checked = {"grad_norms_sorted_by_name", "grad_norm_total"}

    def check(key: str, value: Tensor, tolerance: float = 1e-4) -> None:
        assert_close(value, expected[key], tolerance)
        checked.add(key)

    def check_losses(prefix: str, outputs: Any) -> Tensor:
        losses = criterion(outputs, batch, criterion.counts(batch))
        for term, official in TERMS.items():
            check(f"{prefix}loss/{official}", losses[term] / WEIGHTS[term])
        total = torch.stack(list(losses.values())).sum()
        check(f"{prefix}loss/core_loss", total)
        return total

    order = list(dict.fromkeys([*user.plan(images.shape[1]).conditioning, *sorted(range(images.shape[1]))]))
    for t, memory in zip(order, [*memories, last_memory(model, images, clips, outputs)], strict=True):
        steps = [i for i, frame in enumerate(outputs["frames"]) if frame == t]
        own = {part: [values[i] for i in steps] for part, values in outputs.items()}
        if not steps:  # a given mask is no prediction here; there it is one, which is all right
            given = adopted.pop()
            own = {"frames": [t], "candidates": [given.candidates], "ious": [given.ious], "scores": [given.scores]}
        check_losses(f"frame{t}/", own if steps else {**own, "candidates": [mask_logits(truth[:, t : t + 1])]})
        check(f"frame{t}/maskmem_features", memory)
        best = own["ious"][-1].argmax(1, keepdim=True)
        check(f"frame{t}/pred_masks_low_res", take(own["candidates"][-1], best))
        for i, (candidates, ious, scores) in enumerate(zip(own["candidates"], own["ious"], own["scores"], strict=True)):
            check(f"frame{t}/step{i}/multimasks_low_res", candidates)
            check(f"frame{t}/step{i}/ious", ious)
            check(f"frame{t}/step{i}/object_score_logits", scores)

    check_losses("", outputs).backward()
    parameters = dict(model.named_parameters())
    own_names = key_pairs(parameters, model.official_keys())
    gradients: dict[str, Any] = {key: parameters[own_name].grad for key, own_name in own_names.items()}
    for key in case["grad_params"]:
        if f"grad/{key}" in expected:
            check(f"grad/{key}", gradients[key], 1e-3)
    assert checked == set(expected)
    names = case["result_info"]["grad_norm_names"]
    norms = torch.stack([torch.zeros(()) if gradients[key] is None else gradients[key].norm() for key in names])
    whole = expected["grad_norm_total"][-1]
    np.testing.assert_allclose(norms, expected["grad_norms_sorted_by_name"], rtol=1e-3, atol=1e-6 * whole)
    np.testing.assert_allclose(norms.norm(), whole, rtol=1e-3)
    for key in case["result_info"]["params_without_grad"]:
        assert gradients[key] is None or not gradients[key].any(), key
