"""The criteria against values and gradients that the official losses computed."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loss import BinaryCriterion, structure
from samples import SemanticTarget
from semantic_loss import SemanticCriterion
from tests.conftest import SHARED, needs_shared

pytestmark = needs_shared

TERMS = {"bce": "bce", "iou": "iou", "iou_patch": "iou_patch", "mae": "mae", "mse": "mse", "reg": "reg", "ssim": "ssim"}
TERMS |= {"cnt": "contour", "structure": "structure"}
# (relative, absolute)
VALUE = (1e-5, 1e-6)
GRADIENT = (1e-4, 1e-8)
# Where the terms of a whole PixLoss cancel, the golden's own float32 gradients are up to 3.6 times GRADIENT away from
# those of float64, so these are held against the largest value, as the whole training step's are.
SUMMED_GRADIENT_OF_LARGEST = 1e-4
SIZE = (128, 192)


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", SHARED / "golden" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(SHARED / "golden" / "birefnet" / "losses.npz"))


@pytest.fixture(scope="module")
def lambdas() -> dict[str, dict[str, float]]:
    return json.loads((SHARED / "golden" / "birefnet" / "losses.json").read_text())["lambdas"]


class Inputs:
    """The inputs of the goldens, made from their names."""

    def __init__(self, golden: ModuleType) -> None:
        def image(name: str, channels: int, size: tuple[int, int]) -> Tensor:
            return golden.make_image(f"birefnet/visible/losses/{name}", (2, channels, *size))

        sizes = [(4, 6), (8, 12), (16, 24), SIZE]
        self.logits = 3 * image("logits", 1, SIZE)
        self.targets = {
            "hard": golden.make_mask("birefnet/visible/losses/mask", (2, 1, *SIZE)),
            "soft": torch.sigmoid(3 * image("alpha", 1, SIZE)),
        }
        self.levels = [2 * image(f"level{i}", 1, size) for i, size in enumerate(sizes)]
        self.image = image("image", 3, SIZE)
        self.gradient_logits = [2 * image(f"gdt_pred{i}", 1, size) for i, size in enumerate(sizes[:3])]


@pytest.fixture(scope="module")
def inputs(golden: ModuleType) -> Inputs:
    return Inputs(golden)


def official_criterion(weights: dict[str, float]) -> BinaryCriterion:
    return BinaryCriterion(
        weights, iou_reduction="sum", iou_smooth=0.0, patch_iou="corner", structure_on="probabilities"
    )


def assert_close(actual: Any, expected: np.ndarray, tolerance: tuple[float, float]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance[0], atol=tolerance[1])


def batch_of(masks: Tensor) -> SimpleNamespace:
    return SimpleNamespace(targets=SimpleNamespace(masks=masks, class_ids=torch.full((len(masks),), -1)))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("official", TERMS)
def test_each_term(official: str, target: str, inputs: Inputs, expected: dict, golden: ModuleType) -> None:
    term = TERMS[official]
    criterion, batch = official_criterion({term: 1}), batch_of(inputs.targets[target])
    (logits,) = leaves([inputs.logits])
    value = criterion({"logits": logits}, batch, criterion.counts(batch))[term]
    value.backward()
    assert_close(value.item(), expected[f"{official}_{target}"].item(), VALUE)
    assert_close(golden.sample(logits.grad, 1024), expected[f"{official}_{target}_grad"], GRADIENT)


def test_structure_on_logits(inputs: Inputs, expected: dict) -> None:
    value = structure(inputs.logits.squeeze(1), inputs.targets["hard"].squeeze(1)).mean()
    assert_close(value.item(), expected["structure_hard_on_logits"].item(), VALUE)


@pytest.mark.parametrize("task", ["DIS5K", "General", "Matting"])
def test_weighted_sum_over_levels(task: str, inputs: Inputs, expected: dict, lambdas: dict, golden: ModuleType) -> None:
    criterion = official_criterion(lambdas[task])
    batch = batch_of(inputs.targets["soft" if task == "Matting" else "hard"])
    levels = leaves(inputs.levels)
    losses = criterion({"logits": levels[-1], "levels": levels[:-1]}, batch, criterion.counts(batch))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert_close(total.item(), expected[f"pixloss_{task}_total"].item(), VALUE)
    assert set(losses) == set(lambdas[task])
    for term, value in losses.items():
        # What the official code logs is the mean over levels.
        assert_close(value.item() / 4, expected[f"pixloss_{task}_logged_{term}"].item(), VALUE)
    for index, level in enumerate(levels):
        gradient = golden.sample(level.grad, 512)
        wanted = expected[f"pixloss_{task}_grad_level{index}"]
        assert_close(gradient, wanted, (1e-4, SUMMED_GRADIENT_OF_LARGEST * np.abs(wanted).max()))


def test_gradient_reference(inputs: Inputs, expected: dict, golden: ModuleType) -> None:
    kernel = torch.ones(1, 1, 5, 5)
    kernel[0, 0, 2, 2] = -24
    laplacian = F.conv2d(F.pad(inputs.image.mean(1, keepdim=True), (2, 2, 2, 2), mode="reflect"), kernel / 48)
    predictions, levels = leaves(inputs.gradient_logits), leaves(inputs.levels[:3])
    labels = [laplacian * F.interpolate(level, SIZE, mode="bilinear", align_corners=True) for level in levels]
    outputs = {"logits": inputs.logits, "gradient_logits": predictions, "gradient_labels": labels}
    criterion, batch = BinaryCriterion({"gradient": 1}), batch_of(inputs.targets["hard"])
    losses = criterion(outputs, batch, criterion.counts(batch))
    assert set(losses) == {"gradient"}
    losses["gradient"].backward()
    assert_close(losses["gradient"].item(), expected["gdt_total"].item(), VALUE)
    for index, (prediction, level) in enumerate(zip(predictions, levels, strict=True)):
        alone = criterion(
            {**outputs, "gradient_logits": [prediction], "gradient_labels": [labels[index]]},
            batch,
            criterion.counts(batch),
        )
        assert_close(alone["gradient"].item(), expected[f"gdt_{index}"].item(), VALUE)
        assert_close(golden.sample(prediction.grad, 512), expected[f"gdt_grad_pred{index}"], GRADIENT)
        assert_close(golden.sample(level.grad, 512), expected[f"gdt_grad_level{index}"], GRADIENT)


# ---------------------------------------------------------------- semantic


@pytest.fixture(scope="module")
def segformer(golden: ModuleType) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
    """(Hugging Face's model in training mode, images, labels, the golden case)."""
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "golden" / "segformer"
    case = json.loads((folder / "case_train_b0.json").read_text())
    keys = json.loads((folder / case["keys"]).read_text())
    dropouts = ("drop_path_rate", "classifier_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = transformers.SegformerConfig(num_labels=case["num_labels"], **dict.fromkeys(dropouts, 0.0))
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(
        None, config=config, state_dict=golden.make_state_dict(keys)
    )
    sys.modules["golden"] = golden  # which cases.py imports
    cases = runpy.run_path(str(folder / "cases.py"))
    labels = cases["label_map"](case["labels"]["name"], case["labels"]["shape"], case["num_labels"])
    return model.train(), golden.make_image(**case["image"]), labels.byte(), case


@pytest.mark.parametrize("terms", [("ce",), ("dice",), ("ce", "dice")])
def test_cross_entropy_and_dice_of_segformer(terms: tuple[str, ...], segformer: Any, golden: ModuleType) -> None:
    model, images, labels, case = segformer
    expected = np.load(SHARED / "golden" / "segformer" / "expected_train_b0.npz")
    criterion = SemanticCriterion(dict.fromkeys(terms, 1.0), num_classes=case["num_labels"])
    batch = SimpleNamespace(targets=SemanticTarget(labels))
    counts = criterion.counts(batch)
    assert counts["pixels"].item() == case["values"]["valid_pixels"]
    model.zero_grad()
    losses = criterion({"logits": model(images).logits}, batch, counts)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    name = "_plus_".join(terms)
    assert_close(total.item(), case["values"][name], VALUE)
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    wanted_norm = case["values"][f"total_grad_norm_{name}"]
    assert_close(norms.norm().item(), wanted_norm, (1e-5, 0))
    # Key biases have gradients of rounding alone. The model's own order of parameters is not the golden's.
    wanted = np.sort(expected[f"grad_norm_{name}"])
    assert_close(norms.sort().values.numpy(), wanted, (1e-3, 1e-6 * wanted_norm))
    if len(terms) == 2:
        gradient = golden.sample(model.decode_head.classifier.weight.grad)
        assert_close(gradient, expected[f"grad_sample_classifier_{name}"], (1e-4, 1e-6 * wanted_norm))
