"""SAM 2.1's layouts, settings, groups, memory, tracker, drawn user and losses beyond the goldens."""

from __future__ import annotations

import dataclasses
import json
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from models import infer_family
from models.base import key_pairs
from models.sam2.layers import Attention, drop
from models.sam2.memory import PROMPTED, recall
from models.sam2.model import ONLY_IN_2_1, PARTS, Sam2
from models.sam2.parts import ABSENT, Points
from models.sam2.positions import rotate, rotations
from models.sam2.prompts import RandomUser, center_clicks, noisy_boxes, random_clicks
from models.sam2.tracker import Tracker, fill_holes
from settings import SAM2Settings
from tests.conftest import SHARED, needs_shared
from video_loss import VideoCriterion

FOLDER = SHARED / "golden" / "sam2"
KEY_FILES = sorted(FOLDER.glob("keys_*.json")) if SHARED.is_dir() else []
SIZE = (64, 96)  # height and width of most inputs here


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    return Sam2(**settings)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model whose memory matters, in evaluation mode; what changes it makes its own."""
    model = build(drop_path=0.0, dropout=0.0)
    with torch.no_grad():
        for block in model.memory_attention.layers:
            block.cross_attn_image.out_proj.weight *= 5
        for block in model.memory_encoder.fuser:
            block.gamma.fill_(0.5)
    return model.eval()


def frames_of(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, *SIZE, generator=generator)
    return [base + 0.3 * torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def box_mask(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def clip_batch(num_clips: int = 2, num_frames: int = 3) -> Any:
    """Two objects in the first clip, one in each other; the second appears in the second frame alone."""
    images = torch.stack([torch.stack(frames_of(num_frames, seed)) for seed in range(num_clips)])
    masks = torch.zeros(num_clips + 1, num_frames, *SIZE, dtype=torch.uint8)
    for number, clip in enumerate(masks):
        for t in range(num_frames):
            clip[t] = box_mask(8 * number + 2 * t, 10 + 4 * t, 30 + 8 * number, 60)
    masks[1, 0] = 0
    masks[1, 2:] = 0
    return SimpleNamespace(
        images=images, targets=SimpleNamespace(masks=masks, clips=torch.tensor([0, *range(num_clips)]))
    )


# --- settings and checkpoints -----------------------------------------------------------------------------------------


def empty(path: Path) -> dict[str, Tensor]:
    """The checkpoint of a key file, on the meta device."""
    keys = json.loads(path.read_text())
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()}


@needs_shared
@pytest.mark.parametrize("path", KEY_FILES, ids=lambda path: path.stem)
def test_names_order_and_shapes(path: Path) -> None:
    theirs = empty(path)
    settings = Sam2.infer_settings({"model": theirs})
    assert settings == {"variant": path.stem.removeprefix("keys_")}
    with torch.device("meta"):
        saved = Sam2(**settings).official_state_dict()
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in saved.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in theirs.items()
    ]


def test_settings_dataclass_names_every_argument() -> None:
    fields = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(SAM2Settings)
    }
    arguments = {name: p.default for name, p in signature(Sam2).parameters.items()}
    assert {name: value for name, value in fields.items() if name not in ("family", "pretrained")} == {
        **arguments,
        "trainable": [],
    }


@needs_shared
def test_a_checkpoint_tells_its_family() -> None:
    assert infer_family(empty(KEY_FILES[0])) == ("sam2", {"variant": "base_plus"})


def test_wrapped_prefixed_half_weights_come_back(model: Any) -> None:
    weights = model.official_state_dict()
    other = build()
    report = other.load_official({"model": {f"module.{key}": value.half() for key, value in weights.items()}})
    assert sorted(report.loaded) == sorted(weights)
    assert not report.missing + report.unexpected + report.notes
    saved = other.official_state_dict()
    assert all(torch.equal(saved[key], value.half().float()) for key, value in weights.items())


def test_weights_of_sam_2_0_compute_as_they_did(model: Any) -> None:
    weights = {key: value for key, value in model.official_state_dict().items() if key not in ONLY_IN_2_1}
    other = build()
    report = other.load_official(weights)
    assert not report.missing
    assert "weights of SAM 2.0" in report.summary()
    _, codes = other.object_pointers.tokens(torch.zeros(1, 2, 256), torch.tensor([0.1, 0.7]))
    assert not codes.any()
    features, mask = torch.randn(1, 256, 4, 6), torch.zeros(1, 1, *SIZE)
    absent, present = (other.memory_encoder(features, mask, torch.tensor([[score]])) for score in (-1.0, 1.0))
    assert torch.equal(absent, present)


def test_other_gaps_are_reported(model: Any) -> None:
    weights = model.official_state_dict()
    del weights["no_mem_embed"], weights["no_obj_embed_spatial"]
    weights["sam_mask_decoder.mask_tokens.weight"] = torch.zeros(7, 256)
    other = build()
    kept = other.memory_encoder.no_object.clone()
    report = other.load_official(weights | {"extra": torch.zeros(1)})
    assert report.missing == ["no_mem_embed", "no_obj_embed_spatial"]
    assert list(report.reshaped) == ["sam_mask_decoder.mask_tokens.weight"]
    assert report.unexpected == ["extra"]
    assert torch.equal(other.memory_encoder.no_object, kept)


def test_the_trunk_alone_loads_from_timm_and_from_a_whole_checkpoint(model: Any) -> None:
    trunk = {key: value + 1 for key, value in model.image_encoder.trunk.state_dict().items()}
    other = build()
    report = other.load_encoder(trunk)
    assert not report.missing + report.unexpected
    assert torch.equal(other.image_encoder.trunk.blocks[3].mlp.fc2.weight, trunk["blocks.3.mlp.fc2.weight"])
    report = other.load_encoder({"model": model.official_state_dict()})
    assert not report.missing + report.unexpected
    assert torch.equal(other.image_encoder.neck[2].weight, model.image_encoder.neck[2].weight)


def test_what_cannot_be_is_said(model: Any) -> None:
    with pytest.raises(UserError, match="did you mean tiny"):
        build(variant="tinny")
    with pytest.raises(UserError, match="did you mean mask_decoder"):
        build(trainable=["mask_decoders"])
    with pytest.raises(UserError, match="multiples of 32"):
        model.encode(torch.zeros(1, 3, 64, 80))
    with pytest.raises(UserError, match="no whole SAM 2"):
        Sam2.infer_settings({"conv.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="none of tiny, small"):
        Sam2.infer_settings(
            {
                "image_encoder.trunk.patch_embed.proj.weight": torch.zeros(10, 3, 7, 7),
                "sam_mask_decoder.mask_tokens.weight": torch.zeros(4, 256),
            }
        )


# --- training settings ------------------------------------------------------------------------------------------------


@needs_shared
def test_learning_rates_and_decay_are_the_official_ones(model: Any) -> None:
    expected = json.loads((FOLDER / "expected_optimizer_tiny.json").read_text())["params"]
    groups = model.parameter_groups(5e-6, 0.1, backbone_lr_scale=0.6, layer_decay=0.9)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    pairs = key_pairs(parameters, model.official_keys())
    assert sorted(pairs) == sorted(expected)
    for key, name in pairs.items():
        rate, decay = found[id(parameters[name])]
        assert rate == pytest.approx(expected[key]["lr"]["0.0"]), key
        assert decay == expected[key]["weight_decay"], key


def test_trainable_parts() -> None:
    model = build(trainable=["mask_decoder", "object_pointers"])
    trains = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"mask_decoder", "object_pointers"}
    assert all(p.requires_grad for p in build().parameters())
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == set(PARTS)


# --- numerics ---------------------------------------------------------------------------------------------------------


def test_rotations_are_products_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 15, 32)
    cos, sin = rotations(3, 5, 32, x.device)
    product = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, (cos, sin)), torch.cat((product.real, product.imag), -1))
    assert cos.shape == (15, 16)
    torch.testing.assert_close(cos[7, 0], torch.tensor(2.0).cos())  # column 2 of row 1
    torch.testing.assert_close(cos[7, 8], torch.tensor(1.0).cos())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_few_channels_may_be_weighted_before_they_are_projected(dropout: float) -> None:
    attention = Attention(32, 32, 1, key_dim=8, dropout=dropout)
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 8)
    torch.manual_seed(0)
    few = attention.attend_to_few(query, key, value)
    torch.manual_seed(0)
    torch.testing.assert_close(few, attention.attend(query, key, attention.v_proj(value)))


def test_dropout_keeps_the_mean() -> None:
    x = torch.ones(3, 70001, requires_grad=True)
    dropped = drop(x, 0.1)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())
    assert drop(torch.ones(()), 0.5).item() in (0, 2)


@torch.no_grad()
def test_images_need_not_be_square(model: Any) -> None:
    images = torch.stack([torch.randn(3, 96, 160, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    outputs = model.predict(images)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "logits": (2, 3, 24, 40),
        "ious": (2, 3),
        "scores": (2, 1),
    }
    alone = model.predict(images[1:])["logits"]
    torch.testing.assert_close(outputs["logits"][1:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_given_mask_that_is_empty_is_an_absent_object(model: Any) -> None:
    features = model.encode(torch.stack(frames_of(1))).expand(2)
    masks = torch.stack([box_mask(8, 8, 40, 60), box_mask(0, 0, 0, 0)])[:, None]
    adopted = model.adopt(features, masks)
    assert adopted.scores[:, 0].tolist() == [10, -10]
    assert torch.equal(adopted.pointers[1:], model.object_pointers.no_object)
    torch.testing.assert_close(adopted.masks[1], torch.full_like(adopted.masks[1], -10))
    assert ((F.avg_pool2d(masks.float(), 4) > 0.5) == (adopted.masks > 0)).all()


@torch.no_grad()
def test_graphs_are_the_model(model: Any) -> None:
    model.graph_size = SIZE
    graphs = model.export_graphs()
    images, mask = torch.stack(frames_of(2)), torch.randn(2, 1, 16, 24)
    coarse, conditioned, finer, finest = graphs["image_encoder"][0](images)
    features = model.encode(images)
    assert torch.equal(conditioned, model.without_memory(features))
    points = Points(torch.tensor([[[30.0, 20.0]], [[10.0, 50.0]]]), torch.tensor([[1], [0]]))
    module, _, _ = graphs["mask_decoder"]
    shares = torch.tensor([1.0, 0.0])  # the second image has no mask
    logits, ious, scores, pointers = module(conditioned, finer, finest, points.positions, points.labels, mask, shares)
    for i, masks in enumerate((mask[:1], None)):
        part = features.of(torch.tensor([i]))
        point = Points(points.positions[i : i + 1], points.labels[i : i + 1])
        expected = model.segment(conditioned[i : i + 1], part, point, masks, multimask=True)
        torch.testing.assert_close(logits[i : i + 1, 1:], expected.candidates, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pointers[i, 1 + ious[i, 1:].argmax()], expected.pointers[0], rtol=1e-4, atol=1e-4)
    memories = graphs["memory_encoder"][0](coarse, mask, scores)
    remembering, example, _ = graphs["memory_attention"]
    moments, steps = torch.tensor([PROMPTED]), torch.tensor([1 / 15])
    remembered = remembering(coarse, memories[:, None], moments, pointers[:, :1], steps)
    assert remembered.shape == example[0].shape == coarse.shape
    assert not torch.equal(remembered, conditioned)
    assert all(set(axes) >= set(list(axes)[: len(example)]) for _, example, axes in graphs.values())


# --- what a frame remembers -------------------------------------------------------------------------------------------


def test_recall_forwards() -> None:
    found = recall(10, prompted=[0], tracked=range(1, 10), num_frames=30)
    assert found.memories == ((0, PROMPTED), (4, 6), (5, 5), (6, 4), (7, 3), (8, 2), (9, 1))
    assert found.pointers == ((0, 10), *((10 - away, away) for away in range(1, 10)))
    assert found.longest == 15
    assert recall(1, [0], [], num_frames=4).longest == 3
    assert recall(1, [0], []).longest == 15


def test_recall_backwards_and_with_prompts_to_come() -> None:
    found = recall(5, prompted=[9, 2], tracked=[6, 7, 8], num_frames=10, reverse=True)
    assert found.memories == ((9, PROMPTED), (2, PROMPTED), (8, 3), (7, 2), (6, 1))
    assert found.pointers == ((9, 4), (6, 1), (7, 2), (8, 3))
    assert recall(5, [9, 2], [6], 10, reverse=True, future=True).pointers == ((9, 4), (2, -3), (6, 1))


def test_recall_with_a_stride_keeps_the_last_frame() -> None:
    assert recall(23, [0], range(1, 23), stride=5).memories[1:] == ((5, 5), (10, 4), (15, 3), (20, 2), (22, 1))
    backwards = recall(23, [50], range(24, 50), reverse=True, stride=5).memories[1:]
    assert backwards == ((45, 6), (40, 5), (35, 4), (30, 3), (25, 2), (24, 1))


# --- tracker ----------------------------------------------------------------------------------------------------------


def follow(model: Any, frames: list[Tensor], prompts: dict[int, Any], **options: Any) -> dict[int, list[Tensor]]:
    """{object: its masks in all frames} of objects that are prompted in the first frame."""
    tracker = Tracker(model, SIZE, len(frames), **options)
    for number, prompt in prompts.items():
        if isinstance(prompt, Tensor):
            tracker.add_mask(0, frames[0], number, prompt)
        else:
            tracker.add_points(0, frames[0], number, *prompt)
    found: dict[int, list[Tensor]] = {number: [] for number in prompts}
    for _, numbers, masks in tracker.propagate(enumerate(frames)):
        for number, mask in zip(numbers, masks, strict=True):
            found[number].append(mask)
    return found


def test_several_objects_are_followed_as_each_alone(model: Any) -> None:
    frames = frames_of(4)
    prompts: dict[int, Any] = {7: box_mask(8, 8, 40, 60), 3: ([[70, 20]], [1]), 5: ([], [], [50, 10, 90, 60])}
    together = follow(model, frames, prompts)
    for number, prompt in prompts.items():
        alone = follow(model, frames, {number: prompt})[number]
        for mask, other in zip(together[number], alone, strict=True):
            torch.testing.assert_close(mask, other, rtol=1e-3, atol=1e-3)
    assert (together[7][3] - together[3][3]).abs().max() > 5e-3


def test_memory_is_bounded_and_changes_nothing(model: Any) -> None:
    frames = [frame[:, :32, :32] for frame in frames_of(3)] * 12
    results = []
    for keep, tracked in ((16, {*range(3, 18), *range(20, 36)}), (1000, {*range(3, 36)})):
        tracker = Tracker(model, (32, 32), len(frames), keep)
        tracker.add_mask(2, frames[2], 1, box_mask(4, 4, 20, 30)[:32, :32])
        masks = [masks for _, _, masks in tracker.propagate((t, frames[t]) for t in range(2, 36))]
        assert tracker.objects[1].tracked.keys() == tracked
        backwards = ((number, frames[number]) for number in (2, 1, 0))
        results.append(masks + [masks for _, _, masks in tracker.propagate(backwards, reverse=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_corrections_last(model: Any) -> None:
    frames = frames_of(4)
    masks: dict[bool, list[Tensor]] = {}
    for lasting in (True, False):
        tracker = Tracker(model, SIZE, 4, corrections_condition=lasting)
        tracker.add_mask(0, frames[0], 1, box_mask(8, 8, 40, 60))
        before = [masks for _, _, masks in tracker.propagate(enumerate(frames))]
        corrected = tracker.add_points(2, frames[2], 1, [[80, 50]], [1])
        masks[lasting] = [masks for _, _, masks in tracker.propagate(enumerate(frames))]
        assert not torch.equal(corrected, before[2])
        assert torch.equal(masks[lasting][2], corrected if lasting else before[2])
    assert not torch.equal(masks[True][3], masks[False][3])


def test_more_points_and_objects_that_come_and_go(model: Any) -> None:
    frames = frames_of(3)
    tracker = Tracker(model, (128, 192), 3)
    tracker.add_points(0, frames[0], 1, [[60, 60]], [1])
    both = tracker.add_points(0, frames[0], 1, [[150, 100]], [0], more=True)
    assert tracker.objects[1].points[0].labels.tolist() == [[1, 0]]
    assert tracker.objects[1].points[0].positions.tolist() == [[[30, 30], [75, 50]]]
    seen = []
    for t, numbers, masks in tracker.propagate(enumerate(frames)):
        seen.append(numbers)
        if t == 0:
            assert torch.equal(masks, both)
            tracker.add_mask(1, frames[1], 9, torch.ones(128, 192))
        if t == 1:
            tracker.remove(1)
    assert seen == [[1], [1, 9], [9]]


def test_prompts_that_make_no_sense(model: Any) -> None:
    frame, tracker = frames_of(1)[0], Tracker(model, SIZE)
    with pytest.raises(UserError, match="nothing to follow"):
        next(tracker.propagate([(0, frame)]))
    for prompt, message in {
        (): "needs a point or a box",
        (((1, 2),), ()): "1 points have 0 labels",
        (((1, 2),), (2,)): "each needs one",
        ((), (), (30, 10, 20, 40)): "left, top, right, bottom",
        (((float("nan"), 2),), (1,)): "finite",
    }.items():
        with pytest.raises(UserError, match=message):
            tracker.add_points(0, frame, 1, *prompt)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a mask of shape"):
        tracker.add_mask(0, frame, 1, torch.ones(5, 5))
    assert not tracker.objects
    with pytest.raises(RuntimeError, match="evaluation mode"):
        Tracker(build(), SIZE)


def test_small_holes_are_filled() -> None:
    masks = torch.ones(2, 1, 12, 12)
    masks[0, 0, 3, 3] = masks[0, 0, 4, 4] = -5  # two cells that touch at a corner
    masks[0, 0, 8:11, 8:11] = -5
    masks[1] = -1
    filled = fill_holes(masks, 2)
    assert filled[0, 0, 3, 3] == filled[0, 0, 4, 4] == pytest.approx(0.1)
    assert torch.equal(filled[0, 0, 8:11, 8:11], masks[0, 0, 8:11, 8:11])
    assert torch.equal(filled[1], masks[1])
    assert torch.equal(fill_holes(masks, 1), masks)


# --- the drawn user ---------------------------------------------------------------------------------------------------


def test_clicks_correct_what_is_wrong() -> None:
    truth = torch.stack([box_mask(8, 8, 40, 60), box_mask(8, 8, 40, 60), box_mask(0, 0, 64, 96)])[:, None]
    predicted = truth.clone()
    predicted[0, 0, 8:40, 50:80] = True  # 8 columns right, 20 wrong
    for _ in range(20):
        clicks = random_clicks(truth, predicted)
        x, y = clicks.positions[:, 0].long().unbind(-1)
        assert clicks.labels[:2].tolist() == [[0], [0]]
        assert 60 <= x[0] < 80 <= 96
        assert not truth[1, 0, y[1], x[1]]  # all is right: beside the object
        assert clicks.labels[2] == 1  # and where there is nothing beside it, on it
    center = center_clicks(truth[:1], predicted[:1])
    assert center.labels.tolist() == [[0]]
    assert 69 <= center.positions[0, 0, 0] <= 70


def test_boxes_are_a_little_off() -> None:
    truth = torch.stack([box_mask(10, 20, 40, 80), box_mask(0, 0, 0, 0)])[:, None]
    boxes = torch.stack([noisy_boxes(truth).positions[0].flatten() for _ in range(200)])
    offsets = boxes - torch.tensor([20.0, 10.0, 79.0, 39.0])
    assert offsets.abs().amax(0).tolist() == pytest.approx([5.9, 2.9, 5.9, 2.9], rel=0.1)
    assert noisy_boxes(truth).labels.tolist() == [[2, 3], [-1, -1]]


def test_plans() -> None:
    user = RandomUser(points=0.5, conditioning_frames=2, corrected_frames=3)
    torch.manual_seed(0)
    plans = [user.plan(8) for _ in range(300)]
    assert 0.4 < sum(plan.points for plan in plans) / 300 < 0.6
    assert {len(plan.conditioning) for plan in plans} == {1, 2}
    assert all(plan.conditioning[0] == 0 for plan in plans)
    assert {len(plan.corrected) for plan in plans if plan.points} == {1, 2, 3}
    assert all(plan.corrected[: len(plan.conditioning)] == plan.conditioning for plan in plans if plan.points)
    assert not any(plan.corrected for plan in plans if not plan.points)
    assert {t for plan in plans for t in plan.conditioning[1:]} == set(range(1, 8))
    single = [RandomUser(points=0.0).plan(1) for _ in range(5)]
    assert all(plan.points and plan.conditioning == plan.corrected == [0] for plan in single)


# --- training and evaluation ------------------------------------------------------------------------------------------


def step(model: Any, batch: Any, seed: int = 0) -> dict[str, Tensor]:
    """The losses of a training step, whose gradients are then in the model."""
    torch.manual_seed(seed)
    criterion = VideoCriterion({"focal": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0})
    outputs = model(batch)
    losses = criterion(outputs, batch, criterion.counts(batch))
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return losses


def test_a_step_is_decided_by_its_seed_and_may_recompute() -> None:
    model = build(correction_clicks=1, point_prompts=1.0, corrected_frames=1, drop_path=0.2).train()
    batch = clip_batch(num_clips=1, num_frames=2)
    results = []
    for checkpointing in (False, True):
        model.set_activation_checkpointing(checkpointing)
        losses = step(model, batch)
        norms = [p.grad.norm() if p.grad is not None else torch.zeros(()) for p in model.parameters()]
        results.append(torch.stack([*losses.values(), *norms]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert all(loss.isfinite() for loss in losses.values())
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert "memory_attention.no_memory_position" in unused
    assert not any(name.startswith(("image_encoder", "mask_decoder.transformer")) for name in unused)
    other = step(model, batch, seed=1)
    assert not torch.equal(other["focal"], losses["focal"])


def test_frozen_parts_stay_and_single_frames_train() -> None:
    model = build(trainable=["mask_decoder"], correction_clicks=1).train()
    batch = clip_batch(num_frames=1)
    batch.targets.masks[1] = 0  # an object that is not there
    step(model, batch)
    assert all((p.grad is not None) <= name.startswith("mask_decoder") for name, p in model.named_parameters())
    assert model.mask_decoder.mask_tokens.weight.grad.any()


class Known:
    """The true objects of a clip, each seen in some frames."""

    def __init__(self, masks: Tensor):
        self.object_ids, self.annotated = list(range(len(masks))), [True] * masks.shape[1]
        self.truth = masks.bool().numpy()

    def visible(self, frame: int) -> list[int]:
        return [number for number in self.object_ids if self.truth[number, frame].any()]

    def masks(self, frame: int, objects: Any) -> Any:
        return self.truth[list(objects), frame]


def test_features_of_a_frozen_encoder_are_kept_by_frame_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.sam2 import model as module

    computed: list[Any] = []
    real = module.stages

    def counting(trunk: Any, images: Tensor) -> list[Tensor]:
        computed.append(tuple(images.shape))
        return real(trunk, images)

    monkeypatch.setattr(module, "stages", counting)
    model = build(trainable=["mask_decoder"], correction_clicks=1, dropout=0.0, drop_path=0.3).train()
    plain = build(trainable=["mask_decoder"], correction_clicks=1, dropout=0.0, drop_path=0.0).train()
    model.keep_features(1.0)
    batch = clip_batch()
    batch.samples = [SimpleNamespace(sample_id=name, frames=[4, 2, 2]) for name in ("a", "b")]
    batch.images[:, 2] = batch.images[:, 1]  # the same frame again
    losses = step(model, batch)
    assert computed == 4 * [(1, 3, *SIZE)]
    torch.testing.assert_close(losses, step(plain, batch), rtol=1e-4, atol=1e-5)
    assert step(model, batch) == losses
    assert len(computed) == 4
    batch.images = batch.images[..., :64]
    batch.targets.masks = batch.targets.masks[..., :64]
    step(model, batch)
    assert len(computed) == 8
    model.feature_cache.limit = 0
    batch.samples[0].frames = [5, 5, 6]
    step(model, batch)
    assert len(computed) == 11  # frames that find no room are computed each time


def test_features_of_an_encoder_that_trains_cannot_be_kept() -> None:
    with pytest.raises(UserError, match="the image encoder trains"):
        build().keep_features(1.0)


@pytest.mark.parametrize("prompt", ["mask", "click", "box"])
def test_evaluation_follows_objects_from_where_they_appear(
    model: Any, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "evaluation_prompt", prompt)
    drawn = clip_batch()
    clips = [Known(drawn.targets.masks[:2]), Known(drawn.targets.masks[2:])]

    def predict(numbers: list[int]) -> dict[str, Any]:
        targets = SimpleNamespace(originals=[clips[number] for number in numbers])
        samples = [SimpleNamespace(size=SIZE) for _ in numbers]
        return model.predict(SimpleNamespace(images=[iter(drawn.images[n]) for n in numbers], targets=targets,
                                             samples=samples))  # fmt: skip

    outputs = predict([0, 1])
    assert [logits.shape for logits in outputs["logits"]] == [(2, 3, 16, 24), (1, 3, 16, 24)]
    assert [scores.shape for scores in outputs["scores"]] == [(2, 3), (1, 3)]
    assert outputs["prompted"] == [[0, 1], [0]]
    assert (outputs["logits"][0][1, 0] == ABSENT).all()
    assert (outputs["logits"][0][0, 0] != ABSENT).any()
    torch.testing.assert_close(predict([1])["logits"][0], outputs["logits"][1], rtol=1e-3, atol=1e-3)


def test_losses_of_parts_of_a_batch_sum_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 2, *SIZE, generator=generator) > 0.6
    masks[3] = False
    outputs = {
        "frames": [0, 1, 1],
        "candidates": [torch.randn(4, m, 16, 24, generator=generator) for m in (3, 1, 3)],
        "ious": [torch.rand(4, m, generator=generator) for m in (3, 1, 3)],
        "scores": [torch.randn(4, 1, generator=generator) for _ in range(3)],
    }
    criterion = VideoCriterion({"focal": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0})

    def losses(rows: slice) -> Tensor:
        batch: Any = SimpleNamespace(targets=SimpleNamespace(masks=masks[rows]))
        own = {name: values if name == "frames" else [v[rows] for v in values] for name, values in outputs.items()}
        return torch.stack(list(criterion(own, batch, {"objects": torch.tensor(4.0)}).values()))

    torch.testing.assert_close(losses(slice(0, 1)) + losses(slice(1, 4)), losses(slice(0, 4)))
    assert losses(slice(3, 4))[:3].tolist() == [0, 0, 0]
