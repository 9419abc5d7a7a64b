"""SegFormer's layouts, settings, groups and numerics beyond the goldens."""

from __future__ import annotations

import dataclasses
import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from errors import UserError
from models import create_model, infer_family, infer_settings
from models.segformer import VARIANTS, Head, SegFormer
from settings import SegFormerSettings
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

FOLDER = SHARED / "golden" / "segformer"
KEY_FILES = sorted(FOLDER.glob("keys_*.json")) if SHARED.is_dir() else []
WHOLE = [path for path in KEY_FILES if "_mit_" not in path.stem]
ENCODERS = [path for path in KEY_FILES if "_mit_" in path.stem]


def build(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return create_model("segformer", **{"variant": "b0", "num_classes": 5, **settings})


def images(height: int = 64, width: int = 64, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def empty(path: Path) -> dict[str, Tensor]:
    """The checkpoint of a key file, on the meta device."""
    keys = json.loads(path.read_text())
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_dataclass_names_every_argument() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(SegFormerSettings)}
    arguments = {name: p.default for name, p in signature(SegFormer).parameters.items()}
    assert {name: value for name, value in fields.items() if name not in ("family", "pretrained")} == arguments
    assert list(VARIANTS) == ["b0", "b1", "b2", "b3", "b4", "b5"]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match="did you mean b0"):
        build(variant="b00")
    with pytest.raises(UserError, match="num_classes is 0"):
        build(num_classes=0)
    with pytest.raises(UserError, match="at least 29"):
        build().eval()(images(64, 28))


@pytest.mark.parametrize("size", [(29, 29), (30, 97), (64, 33)])
def test_any_size_from_29_pixels_on(size: tuple[int, int]) -> None:
    logits = build().eval().predict(images(*size))["logits"]
    assert logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert logits.isfinite().all()


# --- official checkpoints ---------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_names_order_and_shapes_of_whole_models(path: Path) -> None:
    layout, variant = path.stem.split("_")[1:3]
    theirs = empty(path)
    settings = infer_settings("segformer", theirs)
    classes = 81 if path.stem.endswith("c81") else 150
    eps = 1e-5 if layout == "hf" else 1e-6
    assert settings == {"variant": variant, "num_classes": classes, "norm_eps": eps}
    with torch.device("meta"):
        model = build(**settings)
    saved = model.official_state_dict("huggingface" if layout == "hf" else "nvlabs")
    used = {key: tensor for key, tensor in theirs.items() if ".conv_seg." not in key}
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in saved.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in used.items()
    ]


@needs_shared
@pytest.mark.parametrize("layout", ["hf", "nvlabs"])
def test_weights_come_back_as_they_went_in(layout: str) -> None:
    weights = golden().make_state_dict(json.loads((FOLDER / f"keys_{layout}_b0_c81.json").read_text()))
    model = build(**infer_settings("segformer", weights))
    report = model.load_official(weights)
    assert sorted(report.loaded + report.ignored) == sorted(weights)
    assert all(".conv_seg." in key for key in report.ignored)
    assert len(report.ignored) == (2 if layout == "nvlabs" else 0)
    saved = model.official_state_dict("huggingface" if layout == "hf" else "nvlabs")
    assert all(torch.equal(saved[key], weights[key]) for key in report.loaded)


@needs_shared
def test_layouts_translate_as_the_mapping_says() -> None:
    model = build(num_classes=150)
    ours = model.official_state_dict()
    halves = {"first half of dim 0": 0, "second half of dim 0": 1}
    mapping = json.loads((FOLDER / "mapping_nvlabs_to_hf_b0.json").read_text())
    for key, tensor in model.official_state_dict("nvlabs").items():
        for name, half in mapping[key]:
            assert torch.equal(ours[name], tensor if half is None else tensor.chunk(2)[halves[half]]), key


@needs_shared
@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_encoders_alone_load(path: Path) -> None:
    keys = json.loads(path.read_text())
    weights = golden().make_state_dict(keys)
    model = build(variant=path.stem[-2:])
    fresh = model.head.classify.weight.clone()
    report = model.load_encoder(weights)
    assert not report.missing + report.unexpected + list(report.reshaped)
    assert len(report.ignored) == 2
    assert len(report.loaded) == len(keys) - 2
    assert torch.equal(model.head.classify.weight, fresh)
    first = next(iter(weights.values()))
    assert torch.equal(model.backbone.patch_embed.proj.weight, first)
    with pytest.raises(UserError, match="no whole SegFormer"):
        infer_settings("segformer", weights)


@pytest.mark.parametrize("layout", ["huggingface", "nvlabs"])
def test_another_number_of_classes_starts_its_classifier_anew(layout: str) -> None:
    source, target = build(1, num_classes=7), build(2)
    fresh = target.head.classify.weight.clone()
    report = target.load_official(source.official_state_dict(layout))
    assert sorted(shapes for shapes in report.reshaped.values()) == [((7,), (5,)), ((7, 256, 1, 1), (5, 256, 1, 1))]
    assert torch.equal(target.head.classify.weight, fresh)
    assert torch.equal(target.head.fuse.weight, source.head.fuse.weight)
    assert "2 of another shape and freshly initialised" in report.summary()


@pytest.mark.parametrize("layout", ["huggingface", "nvlabs"])
@pytest.mark.parametrize(("prefix", "wrapper"), [("module.", "state_dict"), ("_orig_mod.", "model")])
def test_wrapped_prefixed_half_checkpoints_load(layout: str, prefix: str, wrapper: str) -> None:
    source, target = build(1), build(2)
    weights = {prefix + key: value.half() for key, value in source.official_state_dict(layout).items()}
    report = target.load_official({wrapper: weights})
    assert not report.missing + report.unexpected
    key_value = target.backbone.stages[0].blocks[0].attn.kv.weight
    assert torch.equal(key_value, source.backbone.stages[0].blocks[0].attn.kv.weight.half().float())
    assert infer_family({wrapper: weights})[0] == "segformer"


def test_what_lacks_is_named_as_in_the_file() -> None:
    source, target = build(1), build(2)
    weights = source.official_state_dict()
    stem = "segformer.encoder.block.0.0.attention.self"
    del weights[f"{stem}.key.bias"], weights[f"{stem}.value.bias"], weights["decode_head.linear_fuse.weight"]
    report = target.load_official(weights | {"something.else": torch.zeros(3)})
    assert report.missing == [f"{stem}.key.bias", f"{stem}.value.bias", "decode_head.linear_fuse.weight"]
    assert report.unexpected == ["something.else"]


def test_a_foreign_checkpoint_is_none() -> None:
    with pytest.raises(UserError, match="no whole SegFormer"):
        infer_settings("segformer", {"conv.weight": torch.zeros(3)})
    state = build().official_state_dict()
    del state["segformer.encoder.block.1.1.layer_norm_1.weight"]
    short = {key: tensor for key, tensor in state.items() if ".block.1.1." not in key}
    with pytest.raises(UserError, match=r"\(2, 1, 2, 2\) blocks"):
        infer_settings("segformer", short)


def test_published_weights() -> None:
    assert build().published_weights() == {
        "backbone": "hf-hub:nvidia/mit-b0",
        "official": "hf-hub:nvidia/segformer-b0-finetuned-ade-512-512",
    }
    with torch.device("meta"):
        assert build(variant="b5").published_weights()["official"].endswith("b5-finetuned-ade-640-640")


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_head_equals_its_layers_one_after_another(training: bool) -> None:
    torch.manual_seed(0)
    channels = (3, 5, 7, 9)
    head = Head(channels, 16, 4, dropout=0.0).double().train(training)
    nn.init.uniform_(head.norm.weight, 0.5, 1.5)
    features = [
        torch.randn(2, c, *size, dtype=torch.float64)
        for c, size in zip(channels, [(19, 28), (10, 14), (5, 7), (3, 4)], strict=True)
    ]
    wide = [
        F.interpolate(linear(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), (19, 28), mode="bilinear")
        for linear, map in zip(head.project, features, strict=True)
    ]
    wanted = head.classify(F.relu(head.norm(head.fuse(torch.cat(wide[::-1], 1)))))
    assert torch.allclose(head(features), wanted)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = build(drop_path=0.0, dropout=0.0).train()
        model.set_activation_checkpointing(enabled)
        model(images())["logits"].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert torch.allclose(plain, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model = build().eval()
    exact = model.predict(images())["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.predict(images())["logits"]
        training = model.train()(images())["logits"]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() <= 0.05 * exact.abs().max()
    training.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiles_into_one_graph() -> None:
    model = build(drop_path=0.0, dropout=0.0).train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain, traced = model(images())["logits"], compiled(images())["logits"]
    assert torch.allclose(plain, traced, atol=1e-5)
    traced.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(model.compile_parts()) == {"backbone", "head"}


def test_exports_a_graph_of_any_size() -> None:
    model = build().eval()
    ((module, example, axes),) = model.export_graphs().values()
    dynamic = {i: torch.export.Dim(name, min=1 if name == "batch" else 64) for i, name in axes["images"].items()}
    program = torch.export.export(module, example, dynamic_shapes=(dynamic,)).module()
    for picture in (images(96, 160), images(75, 109, batch=3)):
        assert torch.allclose(program(picture), model.predict(picture)["logits"], atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_drop_path_follows_a_schedule() -> None:
    with torch.device("meta"):
        model = build(variant="b2")
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1 * i / 15 for i in range(1, 16) for _ in range(2)])
    model.set_drop_path(0.0)
    assert not any(m.drop_prob for m in model.modules() if isinstance(m, DropPath))
    model.set_drop_path(0.2)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([2 * r for r in rates])


def test_parameter_groups_of_the_official_recipe() -> None:
    model = build()
    groups = model.parameter_groups(6e-4, 0.01, backbone_lr_scale=0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    assert sorted((round(group["lr"], 9), group["weight_decay"]) for group in groups) == [
        (6e-5, 0.0),
        (6e-5, 0.01),
        (6e-4, 0.0),
        (6e-4, 0.01),
    ]
    assert named["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(6e-5)
    assert named["head.project.0.weight"]["lr"] == 6e-4
    assert all(named[name]["weight_decay"] == 0 for name in named if "norm" in name)


def test_layer_depth_rises_along_the_encoder() -> None:
    with torch.device("meta"):
        model = build(variant="b2")
    depths = [model.layer_depth(name)[0] for name, _ in model.backbone.named_parameters(prefix="backbone")]
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (0, 3 + 4 + 6 + 3)
    assert model.layer_depth("head.fuse.weight") == (16, 16)
