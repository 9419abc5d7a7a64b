"""RF-DETR against what the official package computes from the same weights and images."""

from __future__ import annotations

import json
import runpy
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instance_loss import InstanceCriterion
from models import create_model, infer_settings
from models.base import key_pairs
from samples import InstanceTarget
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

pytestmark = needs_shared
FOLDER = SHARED / "golden" / "rfdetr"
EVALUATION = ["nano_384", "seg_nano_312", "seg_nano_264x360_b2", "seg_medium_432"]
NOISE = 10  # times that of the official float32, which each case lists, is the bound


@cache
def read_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, expected arrays) of one case."""
    return json.loads((FOLDER / f"case_{name}.json").read_text()), dict(np.load(FOLDER / f"expected_{name}.npz"))


def load(case: dict[str, Any]) -> Any:
    weights = golden().make_state_dict(json.loads((FOLDER / case["keys_file"]).read_text()))
    model = create_model("rfdetr", **infer_settings("rfdetr", weights))
    report = model.load_official({"model": weights})
    assert not report.missing + report.unexpected + list(report.reshaped) + report.notes
    return model


def image_of(case: dict[str, Any]) -> Tensor:
    return golden().make_image(case["image"]["name"], tuple(case["image"]["shape"]))


def one_group(outputs: dict[str, Tensor], queries: int) -> dict[str, Tensor]:
    """Every layer's results, under the official names, of the first group of a training pass: what evaluation sees."""
    results = {"enc_pred_logits": outputs["encoder_logits"], "enc_pred_boxes": outputs["encoder_boxes"]}
    layers = len(outputs["logits"])
    names = [f"aux{i}_" for i in range(layers - 1)] + [""]
    for i, name in enumerate(names):
        results |= {f"{name}pred_logits": outputs["logits"][i], f"{name}pred_boxes": outputs["boxes"][i]}
    results = {name: value[:, :queries] for name, value in results.items()}
    if "mask_bias" in outputs:
        factors = [
            (f"{name}pred_masks", outputs["mask_queries"][i], outputs["mask_features"][i])
            for i, name in enumerate(names)
        ]
        factors.append(("enc_pred_masks", outputs["encoder_mask_queries"], outputs["encoder_mask_features"]))
        for name, vectors, planes in factors:
            results[name] = torch.einsum("bqd,bdhw->bqhw", vectors[:, :queries], planes) + outputs["mask_bias"]
    return results


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation(name: str) -> None:
    case, expected = read_case(name)
    model, images = load(case), image_of(case)
    predictions = model.eval().predict(images)
    with torch.no_grad():
        every = one_group(model.train()(images), model.num_queries)
    every |= {f"pred_{name}": value for name, value in predictions.items()}
    compared = {key for key in expected if not key.startswith("post")}
    assert set(every) == compared
    for key in compared:
        noise = case["fp32_vs_fp64_max_abs_and_scale"][key][0]
        np.testing.assert_allclose(golden().sample(every[key]), expected[key], rtol=0, atol=NOISE * noise, err_msg=key)


def batch_of(case: dict[str, Any], points: dict[str, Any]) -> Any:
    """The training case's images and objects, each object in a layer of its own."""
    counts = case["targets"]["counts"]
    size = case["image"]["shape"][-2:]
    targets = points["make_targets"](case["targets"]["prefix"], counts, size, case["num_classes"] + 1)
    maps = torch.zeros(len(counts), max(counts), *size, dtype=torch.int16)
    for image, target in enumerate(targets):
        for i, mask in enumerate(target["masks"]):
            maps[image, i][mask] = i + 1
    labels, boxes = (torch.cat([target[key] for target in targets]) for key in ("labels", "boxes"))
    layer_of = torch.cat([torch.arange(count) for count in counts])
    return SimpleNamespace(images=image_of(case), targets=InstanceTarget(counts, labels, boxes, maps, layer_of))


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """(model with its gradients, outputs, terms) of the training case."""
    case, _ = read_case("train_seg_nano_312")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "golden", golden())  # which points.py imports
        points = runpy.run_path(str(FOLDER / "points.py"))
        model, batch = load(case).train(), batch_of(case, points)
        criterion = InstanceCriterion({"class": 1.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0})
        outputs = model(batch)
        patch.setattr(torch, "rand", points["r2_points"])
        losses = criterion(outputs, batch, criterion.counts(batch))
    torch.stack(list(losses.values())).sum().backward()
    return model, outputs, losses


def test_training_outputs(trained: tuple[Any, dict[str, Tensor], dict[str, Tensor]]) -> None:
    _, outputs, _ = trained
    _, expected = read_case("train_seg_nano_312")
    noise = read_case("seg_nano_312")[0]["fp32_vs_fp64_max_abs_and_scale"]  # which the training case does not list
    for official, value in {
        "pred_logits": outputs["logits"][-1],
        "pred_boxes": outputs["boxes"][-1],
        "enc_pred_logits": outputs["encoder_logits"],
        "enc_pred_boxes": outputs["encoder_boxes"],
    }.items():
        bound = NOISE * noise[official][0]
        np.testing.assert_allclose(golden().sample(value), expected[f"out/{official}"], rtol=0, atol=bound)


def test_training_losses_and_gradients(trained: tuple[Any, dict[str, Tensor], dict[str, Tensor]]) -> None:
    model, _, losses = trained
    case, expected = read_case("train_seg_nano_312")
    total = torch.stack(list(losses.values())).sum()
    assert abs(total.item() / case["total_value"] - 1) <= 1e-6
    for term, key in {"box": "bbox", "giou": "giou", "mask": "mask_ce", "dice": "mask_dice", "class": "ce"}.items():
        stages = [f"loss_{key}{stage}" for stage in ("", "_0", "_1", "_2", "_enc")]
        wanted = sum(case["losses"][stage] * case["loss_weights"][stage] for stage in stages)
        assert abs(losses[term].item() / wanted - 1) <= 1e-5, term

    parameters = dict(model.named_parameters())
    gradients = {
        key: model.official_part(key, parameters[name].grad)
        for key, name in key_pairs(parameters, model.official_keys()).items()
    }
    for key, wanted in case["grad_norms_L2"].items():
        bound = NOISE * case["fp32_vs_fp64_rel"]["grad_norm"][key] + 1e-6
        assert abs(gradients[key].double().norm().item() / wanted - 1) <= bound, key
        if f"grad_sample/{key}" in expected:
            samples = expected[f"grad_sample/{key}"]
            found = golden().sample(gradients[key], 512)
            np.testing.assert_allclose(found, samples, rtol=1e-3, atol=1e-4 * np.abs(samples).max(), err_msg=key)
    whole = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    assert abs(whole / case["grad_norm_all"] - 1) <= 1e-4
