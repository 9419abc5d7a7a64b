"""A training step of RF-DETR against what the official package computes: matches, every loss term, gradients.

In float64, because two proposals of the case are only 4e-7 apart, less than float32 rounds. Their order decides which
query starts from which of them.
"""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instance_loss import InstanceCriterion
from matcher import Matches, Stages
from models.base import key_pairs
from samples import InstanceTarget
from settings import InstanceLossSettings
from tests.conftest import needs_shared
from tests.test_golden_birefnet import golden
from tests.test_golden_rfdetr import FOLDER, NOISE, image_of, load, read_case

pytestmark = needs_shared
CASE = "train_seg_nano_312"
TERMS = {"class": "loss_ce", "box": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask_ce", "dice": "loss_mask_dice"}
STAGES = {"final": "", "aux0": "_0", "aux1": "_1", "aux2": "_2", "enc": "_enc"}


def target_of(case: dict[str, Any], make_targets: Any) -> InstanceTarget:
    """The case's objects, each in a layer of its own."""
    given = case["targets"]
    parts = make_targets(given["prefix"], given["counts"], image_of(case).shape[-2:], case["num_classes"] + 1)
    maps = torch.zeros(len(parts), max(given["counts"]), *parts[0]["masks"].shape[-2:], dtype=torch.int16)
    for image, part in enumerate(parts):
        for number, mask in enumerate(part["masks"]):
            maps[image, number][mask] = number + 1
    labels, boxes = (torch.cat([part[name] for part in parts]) for name in ("labels", "boxes"))
    return InstanceTarget(given["counts"], labels, boxes, maps, torch.cat([torch.arange(n) for n in given["counts"]]))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The model after backward, with matches and losses: from the stand-in for random points, and from seed 0."""
    case, expected = read_case(CASE)
    sys.modules["golden"] = golden()  # which points.py imports
    points = runpy.run_path(str(FOLDER / "points.py"))
    model, target = load(case).double().train(), target_of(case, points["make_targets"])
    batch: Any = SimpleNamespace(images=image_of(case).double(), targets=target)
    criterion = InstanceCriterion(InstanceLossSettings().weights, groups=case["settings"]["group_detr"])
    objects = criterion.counts(batch)["objects"]
    outputs = model(batch)
    torch.manual_seed(0)
    with torch.no_grad():
        seeded = criterion.stage_terms(outputs, target, objects)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", points["r2_points"])
        matches = criterion.matcher(Stages.of(outputs), target)
        terms = criterion.stage_terms(outputs, target, objects)
    total = torch.stack([value.sum() * criterion.active[term] for term, value in terms.items()]).sum()
    total.backward()
    return {
        "case": case, "expected": expected, "model": model, "outputs": outputs, "matches": matches,
        "terms": terms, "seeded": seeded, "total": total,
    }  # fmt: skip


def test_outputs(trained: dict[str, Any]) -> None:
    noise = read_case("seg_nano_312")[0]["fp32_vs_fp64_max_abs_and_scale"]  # which the training case does not list
    outputs = trained["outputs"]
    for official, value in {
        "pred_logits": outputs["logits"][-1],
        "pred_boxes": outputs["boxes"][-1],
        "enc_pred_logits": outputs["encoder_logits"],
        "enc_pred_boxes": outputs["encoder_boxes"],
    }.items():
        found = golden().sample(value.detach().float())
        bound = NOISE * noise[official][0]
        np.testing.assert_allclose(found, trained["expected"][f"out/{official}"], rtol=0, atol=bound)


def test_matches(trained: dict[str, Any]) -> None:
    matches: Matches = trained["matches"]
    counts = trained["case"]["targets"]["counts"]
    for image, first in enumerate((0, counts[0])):
        own = matches.image == image
        for stage, name in enumerate(STAGES):
            found = torch.stack([matches.query[stage, own], matches.object[stage, own] - first])
            assert np.array_equal(found, trained["expected"][f"match/{name}/{image}"])


@pytest.mark.parametrize("points", ["terms", "seeded"])
def test_every_loss_term(points: str, trained: dict[str, Any]) -> None:
    case, terms = trained["case"], trained[points]
    wanted = case["losses" if points == "terms" else "seeded0_losses"]
    for term, official in TERMS.items():
        for value, suffix in zip(terms[term].tolist(), STAGES.values(), strict=True):
            noise = case["fp32_vs_fp64_rel"]["loss"][official + suffix]
            assert value == pytest.approx(wanted[official + suffix], rel=NOISE * noise), official + suffix
    if points == "terms":
        noise = case["fp32_vs_fp64_rel"]["total"]
        assert trained["total"].item() == pytest.approx(case["total_value"], rel=NOISE * noise)


def test_gradients(trained: dict[str, Any]) -> None:
    case, expected, model = trained["case"], trained["expected"], trained["model"]
    parameters = dict(model.named_parameters())
    pairs = key_pairs(parameters, model.official_keys())
    gradients: dict[str, Tensor] = {
        key: model.official_part(key, parameters[name].grad)
        for key, name in pairs.items()
        if name in parameters and parameters[name].grad is not None
    }
    for key, norm in case["grad_norms_L2"].items():
        noise = case["fp32_vs_fp64_rel"]["grad_norm"][key]
        assert gradients[key].double().norm() == pytest.approx(norm, rel=NOISE * noise), key
    for key, values in ((k.removeprefix("grad_sample/"), v) for k, v in expected.items() if "grad_sample/" in k):
        difference = (golden().sample(gradients[key], 512) - values)[:-3]
        # Single values are off by more in float32, where it rounds to the other side of a ReLU or of a pixel.
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(values[:-3]), key
    whole = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    assert whole == pytest.approx(case["grad_norm_all"], rel=1e-5)
