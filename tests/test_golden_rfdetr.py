"""RF-DETR against what the official package computes from the same weights and images."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import create_model, infer_settings
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


def every_layer(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every layer's results of a training pass under the official names."""
    results = {"enc_pred_logits": outputs["encoder_logits"], "enc_pred_boxes": outputs["encoder_boxes"]}
    layers = len(outputs["logits"])
    names = [f"aux{i}_" for i in range(layers - 1)] + [""]
    for i, name in enumerate(names):
        results |= {f"{name}pred_logits": outputs["logits"][i], f"{name}pred_boxes": outputs["boxes"][i]}
    if "mask_bias" in outputs:
        factors = [
            (f"{name}pred_masks", outputs["mask_queries"][i], outputs["mask_features"][i])
            for i, name in enumerate(names)
        ]
        factors.append(("enc_pred_masks", outputs["encoder_mask_queries"], outputs["encoder_mask_features"]))
        for name, vectors, planes in factors:
            results[name] = torch.einsum("bqd,bdhw->bqhw", vectors, planes) + outputs["mask_bias"]
    return results


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation(name: str) -> None:
    case, expected = read_case(name)
    model, images = load(case), image_of(case)
    predictions = model.eval().predict(images)
    model.proposals.groups = 1  # the others cost time, and evaluation does not see them
    with torch.no_grad():
        every = every_layer(model.train()(images))
    every |= {f"pred_{name}": value for name, value in predictions.items()}
    compared = {key for key in expected if not key.startswith("post")}
    assert set(every) == compared
    for key in compared:
        noise = case["fp32_vs_fp64_max_abs_and_scale"][key][0]
        np.testing.assert_allclose(golden().sample(every[key]), expected[key], rtol=0, atol=NOISE * noise, err_msg=key)
