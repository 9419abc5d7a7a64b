"""SegFormer against what Hugging Face's and NVlabs' code compute from the same weights and images."""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maps import argmax_at
from models import create_model, infer_settings
from models.base import key_pairs
from samples import SemanticTarget
from semantic_loss import SemanticCriterion
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

pytestmark = needs_shared
FOLDER = SHARED / "golden" / "segformer"
HUGGING_FACE = ["b0_128", "b0_96x160", "b0_odd_75x109", "b2_128", "b2_96x160"]
NVLABS = ["nvlabs_b0_128", "nvlabs_b2_96x160"]


def label_map(case: dict[str, Any]) -> Tensor:
    """(B, H, W) uint8 labels of a case, made from their name."""
    sys.modules["golden"] = golden()  # which cases.py imports
    cases = runpy.run_path(str(FOLDER / "cases.py"))
    labels = cases["label_map"](case["labels"]["name"], case["labels"]["shape"], case["num_labels"])
    return labels.to(torch.uint8)


def read_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, expected arrays) of one case."""
    return json.loads((FOLDER / f"case_{name}.json").read_text()), dict(np.load(FOLDER / f"expected_{name}.npz"))


def weights_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """The official checkpoint of a case."""
    return golden().make_state_dict(json.loads((FOLDER / case["keys"].split()[0]).read_text()))


def image_of(case: dict[str, Any]) -> Tensor:
    image = golden().make_image(case["image"]["name"], tuple(case["image"]["shape"]))
    return image * case["image"].get("scale", 1)


def load(case: dict[str, Any], **settings: Any) -> Any:
    weights = weights_of(case)
    model = create_model("segformer", **infer_settings("segformer", weights), **settings)
    report = model.load_official(weights)
    assert not report.missing + report.unexpected + list(report.reshaped) + report.notes
    return model


def assert_close(value: Tensor, expected: np.ndarray, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """As the cases state it: `atol` is a factor of the largest value."""
    count = len(expected) - 3
    np.testing.assert_allclose(golden().sample(value, count), expected, rtol=rtol, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_evaluation_of_hugging_face(name: str) -> None:
    case, expected = read_case(name)
    model, image = load(case).eval(), image_of(case)
    for i, feature in enumerate(model.backbone(image)):
        assert_close(feature, expected[f"stage{i}"])
    logits = model.predict(image)["logits"]
    assert_close(logits, expected["logits"])
    assert_close(F.interpolate(logits, image.shape[-2:], mode="bilinear"), expected["upsampled"])
    classes = golden().sample(argmax_at(logits, (image.shape[-2], image.shape[-1])).float())
    assert (classes[:-3] != expected["argmax"][:-3]).mean() <= 1e-3


@pytest.mark.parametrize("name", NVLABS)
def test_evaluation_of_nvlabs(name: str) -> None:
    case, expected = read_case(name)
    model, image = load(case).eval(), image_of(case)
    assert model.norm_eps == 1e-6
    assert_close(model.predict(image)["logits"], expected["logits"])

    other = create_model("segformer", variant=case["variant"], num_classes=case["num_labels"]).eval()
    assert "norms with ε 1e-06" in other.load_official(weights_of(case)).summary()
    assert_close(other.predict(image)["logits"], expected["logits_hf_eps"])


def test_epsilon_of_the_patch_embedding() -> None:
    case, expected = read_case("eps_b0_64")
    model, image = load(case).eval(), image_of(case)
    torch.nn.init.zeros_(model.backbone.patch_embed.proj.bias)
    assert_close(model.backbone(image)[0], expected["stage0"])
    assert_close(model.predict(image)["logits"], expected["logits"])


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The training case's model after each loss, with the values and the gradients."""
    case, expected = read_case("train_b0")
    results: dict[str, Any] = {"case": case, "expected": expected}
    for name, terms in {"ce": ("ce",), "dice": ("dice",), "ce_plus_dice": ("ce", "dice")}.items():
        model = load(case, drop_path=0.0, dropout=0.0).train()
        criterion = SemanticCriterion(dict.fromkeys(terms, 1.0), num_classes=case["num_labels"])
        batch = SimpleNamespace(images=image_of(case), targets=SemanticTarget(label_map(case)))
        outputs = model(batch)
        losses = criterion(outputs, batch, criterion.counts(batch))
        torch.stack(list(losses.values())).sum().backward()
        results[name] = (model, outputs["logits"], losses)
    return results


def test_training_logits_and_statistics(trained: dict[str, Any]) -> None:
    model, logits, _ = trained["ce"]
    assert_close(logits, trained["expected"]["logits"])
    assert_close(model.head.norm.running_mean, trained["expected"]["bn_running_mean_after"])
    assert_close(model.head.norm.running_var, trained["expected"]["bn_running_var_after"])


@pytest.mark.parametrize("name", ["ce", "dice", "ce_plus_dice"])
def test_training_losses_and_gradients(name: str, trained: dict[str, Any]) -> None:
    case, expected, (model, _, losses) = trained["case"], trained["expected"], trained[name]
    total = torch.stack(list(losses.values())).sum()
    assert abs(total.item() / case["values"][name] - 1) <= 1e-5

    parameters = dict(model.named_parameters())
    pairs = key_pairs(parameters, model.official_keys())
    norms = [model.official_part(key, parameters[pairs[key]].grad).norm() for key in case["parameters"]]
    whole = case["values"][f"total_grad_norm_{name}"]
    np.testing.assert_allclose(torch.stack(norms), expected[f"grad_norm_{name}"], rtol=1e-3, atol=1e-6 * whole)
    assert abs(torch.stack(norms).norm() / whole - 1) <= 1e-3
    if name == "ce_plus_dice":
        for part, parameter in {
            "classifier": model.head.classify.weight,
            "patch_embed0": model.backbone.patch_embed.proj.weight,
        }.items():
            assert_close(parameter.grad, expected[f"grad_sample_{part}_{name}"], rtol=1e-3)
