"""BiRefNet against what the official code computes from the same weights and images."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from loss import BinaryCriterion
from models import create_model
from models.base import key_pairs
from tests.conftest import SHARED, needs_shared

pytestmark = needs_shared
GOLDEN = SHARED / "golden"
LOGITS_TOLERANCE = 2e-5
EVALUATION = {
    "swin_t_256": "swin_v1_t",
    "swin_t_224x320": "swin_v1_t",
    "swin_l_256": "swin_v1_l",
    "pvt_v2_b2_256": "pvt_v2_b2",
    "resnet50_256": "resnet50",
    "vgg16_256": "vgg16",
    "vgg16bn_128x192": "vgg16bn",
}


@cache
def golden() -> Any:
    """The module that makes weights and images from names."""
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Tensor]]:
    """(description, expected arrays, official weights) of one case."""
    case = json.loads((GOLDEN / "birefnet" / f"case_{name}.json").read_text())
    keys = json.loads((GOLDEN / "birefnet" / case["keys"]).read_text())
    return case, dict(np.load(GOLDEN / "birefnet" / f"expected_{name}.npz")), golden().make_state_dict(keys)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_logits(name: str) -> None:
    case, expected, weights = read_case(name)
    model = create_model("birefnet", backbone=EVALUATION[name]).eval()
    report = model.load_official(weights)
    assert not report.missing + report.unexpected + list(report.reshaped)
    image = golden().make_image(case["input"]["name"], tuple(case["input"]["shape"]))
    logits = model.predict(image)["logits"]
    assert np.abs(golden().sample(logits) - expected["logits"]).max() <= LOGITS_TOLERANCE


def training_case(name: str, shape: tuple[int, ...]) -> tuple[Any, nn.Module, Any, BinaryCriterion]:
    """(expected, model in training mode without dropout or drop path, batch, criterion) of a training case."""
    _, expected, weights = read_case(name)
    model = create_model("birefnet", drop_path=0.0, dropout=0.0)
    model.load_official(weights)
    model.train()
    assert all(module.drop_prob == 0 for module in model.modules() if isinstance(module, DropPath))
    if name != "swin_t_train_bnbatch":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    batch_size, _, height, width = shape
    images = golden().make_image(f"birefnet/visible/{name}/image", shape)
    masks = golden().make_mask(f"birefnet/visible/{name}/mask", (batch_size, 1, height, width))
    class_ids = torch.full((batch_size,), -1)
    batch = SimpleNamespace(images=images, targets=SimpleNamespace(masks=masks, class_ids=class_ids))
    terms = {"bce": 30.0, "iou": 0.5, "ssim": 10.0, "gradient": 1.0}
    return expected, model, batch, BinaryCriterion(terms, iou_reduction="sum", iou_smooth=0.0)


def relative_error(value: Tensor, expected: np.ndarray) -> float:
    sampled = (
        golden().sample(value, len(expected) - 3) if len(expected) > 1 else value.detach().double().view(1).numpy()
    )
    if len(expected) < 64 and len(sampled) != len(expected):  # small tensors are stored whole
        sampled = golden().sample(value)
    return np.abs(sampled - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "shape"), [("swin_t_train_bnfrozen", (1, 3, 256, 256)), ("swin_t_train_bnbatch", (4, 3, 128, 128))]
)
def test_training_outputs_losses_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    case, _, _ = read_case(name)
    expected, model, batch, criterion = training_case(name, shape)
    outputs = model(batch)
    losses = criterion(outputs, batch, criterion.counts(batch))
    sum(losses.values()).backward()

    noise = case["float32_vs_float64_max_error_over_max_abs"]
    values = {f"pred_{i}": level for i, level in enumerate([*outputs["levels"], outputs["logits"]])}
    values |= {f"gdt_pred_{i}": level for i, level in enumerate(outputs["gradient_logits"])}
    values |= {f"gdt_label_{i}": level for i, level in enumerate(outputs["gradient_labels"])}
    values |= {"loss_gdt": losses["gradient"], "loss_total": sum(losses.values())}
    for key, value in values.items():
        assert relative_error(value, expected[key]) <= 1e-4, key

    parameters = dict(model.named_parameters())
    own_names = key_pairs(model.state_dict(), model.official_keys())
    checked = 0
    for key in expected:
        kind, _, official = key.partition("__")
        if kind not in ("grad", "grad_norm"):
            continue
        chosen = list(parameters.values()) if official == "ALL" else [parameters[own_names[official]]]
        gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
        assert len(gradients) == len(chosen)
        gradient = gradients[0] if len(gradients) == 1 else torch.cat([part.flatten() for part in gradients])
        value = gradient.double().norm() if kind == "grad_norm" else gradient
        assert relative_error(value, expected[key]) <= max(1e-3, 10 * noise[key]), key
        checked += 1
    assert checked >= 20

    modules = dict(model.named_modules())
    for key in expected:
        statistic, _, official = key.partition("__")
        if statistic in ("running_mean", "running_var", "num_batches_tracked"):
            module = modules[own_names[f"{official}.{statistic}"].rpartition(".")[0]]
            assert relative_error(getattr(module, statistic).double(), expected[key]) <= 1e-4, key


def test_five_optimizer_steps_follow_the_official_trajectory() -> None:
    expected, model, batch, criterion = training_case("swin_t_train_steps", (2, 3, 128, 128))
    groups = model.parameter_groups(lr=1e-4, weight_decay=1e-2, decay_norms=True)
    assert len(groups) == 1
    optimizer = torch.optim.AdamW(groups)
    for step, wanted in enumerate(expected["trajectory"]):
        loss = sum(criterion(model(batch), batch, criterion.counts(batch)).values())
        assert abs(loss.item() / wanted - 1) <= 1e-3, step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
