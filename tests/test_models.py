"""The models' settings, checkpoints, parameter groups and numerics beyond the goldens."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from config import BiRefNetSettings
from errors import UserError
from models import create_model, infer_settings
from models.backbones import BACKBONES
from models.base import LoadReport
from models.birefnet import BiRefNet, laplacian, make_identity, stack_patches
from models.deformable import _convolve_grid, deformable_convolution
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

KEY_FILES = sorted((SHARED / "golden" / "birefnet").glob("keys_*.json")) if SHARED.is_dir() else []
SMALL = {"backbone": "pvt_v2_b0"}


def images(size: int = 64, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return create_model("birefnet", **{**SMALL, **settings})


def randomise_norms(model: nn.Module) -> None:
    """Weights and statistics as after some training, so that an evaluation pass notices every BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name in ("weight", "running_var"):
                nn.init.uniform_(state[name], 0.5, 1.5)
            for name in ("bias", "running_mean"):
                nn.init.normal_(state[name], std=0.1)


def official_keys(path: Any) -> dict[str, list]:
    return json.loads(path.read_text())


def flatten(outputs: dict[str, Any]) -> list[Tensor]:
    return [tensor for value in outputs.values() for tensor in (value if isinstance(value, list) else [value])]


def backward(outputs: dict[str, Any]) -> None:
    torch.stack([tensor.float().square().mean() for tensor in flatten(outputs)]).sum().backward()


# --- settings ---------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "no decoder input": {"decoder_input": False},
    "decoder input not split": {"decoder_input_split": False},
    "empty squeeze with context": {"squeeze_block": ""},
    "empty squeeze, no context": {"squeeze_block": "", "context": 0},
    "one context map": {"context": 1},
    "ResBlk_x4": {"squeeze_block": "ResBlk_x4"},
    "ASPP_x3": {"squeeze_block": "ASPP_x3"},
    "ASPPDeformable_x3": {"squeeze_block": "ASPPDeformable_x3"},
    "residual decoder, plain ASPP": {"decoder_block": "ResBlk", "decoder_attention": "ASPP"},
    "no attention, adaptive width": {"decoder_attention": "none", "decoder_channels": "adaptive"},
    "vgg, maps added": {"backbone": "vgg16", "multi_scale_input": "add", "squeeze_block": ""},
    "resnet, maps added": {"backbone": "resnet50", "multi_scale_input": "add", "decoder_attention": "none"},
    "one scale": {"multi_scale_input": "none"},
    "no supervision of levels": {"multi_scale_supervision": False},
    "no gradient supervision": {"gradient_supervision": False},
    "refinement": {"refine": "unet"},
    "refinement alone": {"refine": "unet", "multi_scale_supervision": False},
    "auxiliary classes": {"auxiliary_classes": 7},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_evaluates_and_is_inferred(name: str) -> None:
    settings = SETTINGS[name]
    model = build(**settings).train()
    outputs = model(images())
    supervised = settings.get("multi_scale_supervision", True)
    gated = supervised and settings.get("gradient_supervision", True)
    refined = settings.get("refine") == "unet"
    sides = [2, 4, 8] * supervised + [64] * refined
    assert [tuple(level.shape) for level in outputs.get("levels", [])] == [(2, 1, side, side) for side in sides]
    assert [level.shape[-1] for level in outputs.get("gradient_logits", [])] == [2, 4, 8] * gated
    assert [level.shape[-1] for level in outputs.get("gradient_labels", [])] == [64, 64, 64] * gated
    assert ("class_logits" in outputs) == ("auxiliary_classes" in settings)
    assert all(tensor.isfinite().all() for tensor in flatten(outputs))

    backward(outputs)
    # A fresh refinement's last layer is zero, so what lies before it has a gradient of zero but has one.
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without

    predictions = model.eval().predict(images())
    assert list(predictions) == ["logits"]
    assert predictions["logits"].shape == (2, 1, 64, 64)

    inferred = infer_settings("birefnet", model.official_state_dict())
    expected = {field.name: field.default for field in dataclasses.fields(BiRefNetSettings)} | SMALL | settings
    expected["gradient_supervision"] = gated
    if settings.get("multi_scale_input") == "add":
        expected["multi_scale_input"] = "none"  # leaves no trace in the shapes
    if not expected["decoder_input"]:
        inferred["decoder_input_split"] = expected["decoder_input_split"]
    assert inferred == {key: expected[key] for key in inferred}


def test_settings_dataclass_names_every_argument() -> None:
    from inspect import signature

    fields = {field.name: field.default for field in dataclasses.fields(BiRefNetSettings)}
    arguments = {name: p.default for name, p in signature(BiRefNet).parameters.items()}
    assert {name: value for name, value in fields.items() if name not in ("family", "pretrained")} == arguments


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean birefnet"):
        create_model("birefnett")
    with pytest.raises(UserError, match="did you mean squeeze_block"):
        create_model("birefnet", squeeze_blok="")
    with pytest.raises(UserError, match="did you mean swin_v1_t"):
        create_model("birefnet", backbone="swin_v1_tt")
    with pytest.raises(UserError, match="multiples of 32"):
        build().eval()(torch.zeros(1, 3, 64, 80))


def test_refinement_starts_as_no_change() -> None:
    plain, refined = build().eval(), build(refine="unet").eval()
    refined.load_official(plain.official_state_dict())
    assert torch.equal(plain(images())["logits"], refined(images())["logits"])


def test_dinov3_smallest_trains_its_decoder() -> None:
    model = build(backbone="dino_v3_s").train()
    outputs = model(images())
    backward(outputs)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    state = model.official_state_dict()
    assert {"bb.model.blocks.0.attn.qkv.weight", "decoder.pyramid_neck_x4.conv.weight"} <= set(state)
    assert infer_settings("birefnet", state)["backbone"] == "dino_v3_s"
    assert not build(backbone="dino_v3_s", freeze_backbone=False).backbone.model.patch_embed.proj.weight.grad_fn


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_the_channels_of_its_row(name: str) -> None:
    with torch.device("meta"):
        encoder = BACKBONES[name].build(0.1)
        features = encoder(torch.zeros(1, 3, 96, 64))
    assert [f.shape[1] for f in features] == list(BACKBONES[name].channels)
    strides = [16, 16, 16, 16] if name.startswith("dino") else [4, 8, 16, 32]
    assert [tuple(f.shape[2:]) for f in features] == [(96 // s, 64 // s) for s in strides]


# --- official checkpoints ---------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("path", KEY_FILES, ids=lambda path: path.stem)
def test_official_state_dict_round_trip(path: Any) -> None:
    keys = official_keys(path)
    name = path.stem.removeprefix("keys_").removesuffix("_batch_size_1")
    with torch.device("meta"):
        empty = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in keys.items()}
        settings = infer_settings("birefnet", empty)
        model = create_model("birefnet", **settings)
    assert settings["backbone"] == name
    saved = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in model.official_state_dict().items()
    }
    if "batch_size_1" in path.stem:
        saved = {key: value for key, value in saved.items() if key in keys}
        assert saved == keys
    else:
        assert list(saved.items()) == list(keys.items())


@needs_shared
@pytest.mark.parametrize("name", ["swin_v1_t", "pvt_v2_b0", "resnet50", "vgg16bn"])
def test_weights_come_back_as_they_went_in(name: str) -> None:
    weights = golden().make_state_dict(official_keys(SHARED / "golden" / "birefnet" / f"keys_{name}.json"))
    model = build(backbone=name)
    report = model.load_official(weights)
    assert sorted(report.loaded) == sorted(weights)
    saved = model.official_state_dict()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


@needs_shared
def test_batch_size_1_checkpoint_evaluates_as_without_norms() -> None:
    weights = golden().make_state_dict(
        official_keys(SHARED / "golden" / "birefnet" / "keys_swin_v1_t_batch_size_1.json")
    )
    model = build(backbone="swin_v1_t").eval()
    report = model.load_official(weights)
    assert not report.missing
    assert "43 BatchNorms act as identities" in report.summary()
    logits = model(images())["logits"]
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, child_name, nn.Identity())
    assert (model(images())["logits"] - logits).abs().max() <= 1e-6


def test_identity_norm_is_exact() -> None:
    norm = nn.BatchNorm2d(5).eval()
    make_identity(norm)
    x = torch.randn(3, 5, 7, 7) * 100
    assert torch.equal(norm(x), x)


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("", lambda weights: {"model": {"ema": weights}}),
        ("module.", lambda weights: {"state_dict": weights}),
        ("_orig_mod.module.", lambda weights: {"model_state_dict": weights, "epoch": 3}),
        ("module._orig_mod.", lambda weights: weights),
    ],
)
def test_wrapped_prefixed_half_checkpoints_load(prefix: str, wrap: Any) -> None:
    source, target = build(1), build(2)
    weights = {prefix + key: value.half() for key, value in source.official_state_dict().items()}
    report = target.load_official(wrap(weights))
    assert not report.missing + report.unexpected
    wanted = source.official_state_dict()["decoder.conv_out1.0.weight"].half().float()
    assert torch.equal(target.decoder.head.out.weight, wanted)
    assert target.decoder.head.out.weight.dtype == torch.float32
    assert infer_settings("birefnet", wrap(weights))["backbone"] == "pvt_v2_b0"


def test_foreign_checkpoint_is_reported_not_raised() -> None:
    source, target = build(1), build(2)
    weights = source.official_state_dict()
    fresh = target.decoder.head.out.weight.clone()
    weights["decoder.conv_out1.0.weight"] = torch.zeros(1, 3, 1, 1)
    del weights["bb.norm1.weight"]
    weights |= {"head.weight": torch.zeros(3), "cls_head.0.weight": torch.zeros(2, 2)}
    report = target.load_official(weights)
    assert report.missing == ["bb.norm1.weight"]
    assert report.unexpected == ["head.weight"]
    assert report.ignored == ["cls_head.0.weight"]
    assert report.reshaped == {"decoder.conv_out1.0.weight": ((1, 3, 1, 1), tuple(fresh.shape))}
    assert torch.equal(target.decoder.head.out.weight, fresh)
    summary = report.summary()
    assert all(word in summary for word in ("1 missing", "1 unexpected", "1 ignored", "1×3×1×1", "bb.norm1.weight"))


def test_checkpoints_of_nothing_known_are_user_errors() -> None:
    with pytest.raises(UserError, match="no weights"):
        build().load_official({"epoch": 3})
    with pytest.raises(UserError, match="no BiRefNet"):
        infer_settings("birefnet", {"bb.conv.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="encoder"):
        infer_settings("birefnet", {"decoder.decoder_block4.conv_in.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("backbone", "published", "own"),
    [
        ("resnet50", "layer4.2.conv3.weight", "layer4.2.conv3.weight"),
        ("vgg16", "features.12.weight", "conv2.12.weight"),
        ("pvt_v2_b0", "block2.1.attn.q.weight", "stages.1.blocks.1.attn.q.weight"),
        ("swin_v1_t", "layers.2.blocks.5.mlp.fc1.weight", "layers.2.blocks.5.mlp.fc1.weight"),
        ("dino_v3_s", "blocks.3.attn.qkv.weight", "model.blocks.3.attn.qkv.weight"),
    ],
)
def test_published_encoder_weights_load(backbone: str, published: str, own: str) -> None:
    with torch.device("meta"):
        shape = build(backbone=backbone).backbone.get_parameter(own).shape
    model = build(backbone=backbone, multi_scale_input="none", decoder_attention="none")
    report = model.load_encoder({published: torch.full(shape, 3.0), "head.weight": torch.zeros(1000, 7)})
    assert len(report.loaded) == 1
    assert report.unexpected == ["bb.head.weight"]
    assert (model.backbone.get_parameter(own) == 3).all()


# --- training ---------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = build(backbone="swin_v1_t")
    total = sum(p.numel() for p in model.parameters())
    (official,) = model.parameter_groups(1e-4, 1e-2, decay_norms=True)
    assert (official["lr"], official["weight_decay"], len(official["params"])) == (
        1e-4,
        1e-2,
        len(list(model.parameters())),
    )

    groups = model.parameter_groups(1.0, 0.1, backbone_lr_scale=0.5, layer_decay=0.9)
    assert sum(p.numel() for group in groups for p in group["params"]) == total
    of = {id(p): group for group in groups for p in group["params"]}
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    assert named["decoder.head.out.weight"]["lr"] == 1.0
    assert named["backbone.layers.3.blocks.1.mlp.fc2.weight"]["lr"] == 0.5
    assert named["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(0.5 * 0.9**12)
    assert named["backbone.layers.0.blocks.1.mlp.fc2.weight"]["lr"] == pytest.approx(0.5 * 0.9**10)
    undecayed = {name for name, group in named.items() if group["weight_decay"] == 0}
    for name, parameter in model.named_parameters():
        assert (name in undecayed) == (parameter.ndim <= 1 or name.endswith("relative_position_bias_table")), name


@pytest.mark.parametrize("name", BACKBONES)
def test_layer_depth_rises_along_every_encoder(name: str) -> None:
    with torch.device("meta"):
        model = build(backbone=name, freeze_backbone=False)
    depths = [model.layer_depth(key) for key, _ in model.backbone.named_parameters(prefix="backbone")]
    assert [depth for depth, _ in depths] == sorted(depth for depth, _ in depths)
    blocks = {"swin_v1_t": 12, "pvt_v2_b5": 3 + 6 + 40 + 3, "resnet50": 16, "vgg16": 13, "dino_v3_l": 24}
    first, total = depths[0]
    assert (first, total) == (0 if not name.startswith("vgg") else 1, blocks.get(name, total))
    assert model.layer_depth("decoder.head.out.weight")[0] == total


def test_freezing_by_name() -> None:
    model = build(backbone="resnet50", multi_scale_input="none", decoder_attention="none").train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    count = model.freeze(["backbone", "decoder.stages.?.mask.*"])
    assert count == len(list(model.backbone.parameters())) + 6
    model.train()
    backward(model(images()))
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert model.decoder.stages[0].block.bn_in.training
    assert not any(p.grad is not None for p in model.backbone.parameters())
    with pytest.raises(UserError, match="did you mean backbone"):
        model.freeze(["backbon"])


def test_drop_path_follows_a_schedule() -> None:
    model = build(backbone="swin_v1_t")
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(1, 12)])
    model.set_drop_path(0.0)
    model.set_drop_path(0.1)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([r / 2 for r in rates])


@pytest.mark.parametrize("backbone", ["swin_v1_t", "pvt_v2_b0", "vgg16bn"])
def test_activation_checkpointing_changes_no_gradient(backbone: str) -> None:
    results = []
    for enabled in (False, True):
        model = build(backbone=backbone, drop_path=0.0, dropout=0.0, refine="unet").train()
        model.set_activation_checkpointing(enabled)
        outputs = model(images())
        backward(outputs)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        results.append(({name: p.grad for name, p in model.named_parameters()}, buffers))
    for plain, repeated in zip(*results, strict=True):
        for name in plain:
            assert torch.allclose(plain[name], repeated[name], rtol=1e-4, atol=1e-6), name


def test_a_batch_of_one_trains() -> None:
    model = build().train()
    outputs = model(images(batch=1))
    backward(outputs)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model = build().eval()
    randomise_norms(model)
    exact = model.predict(images())["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.predict(images())["logits"]
        training = model.train()(images())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() <= 0.05 * exact.abs().max()
    backward(training)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("convolve", [deformable_convolution, _convolve_grid])
def test_deformable_convolution_equals_torchvision(kernel: int, convolve: Any) -> None:
    generator = torch.Generator().manual_seed(kernel)
    shapes = [(2, 5, 9, 13), (2, 2 * kernel**2, 9, 13), (2, kernel**2, 9, 13), (4, 5, kernel, kernel)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[1] *= 3  # offsets that leave the map too

    def reference(x: Tensor, offset: Tensor, modulator: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, padding=kernel // 2, mask=modulator)

    results = []
    for function in (reference, convolve):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.sin().sum(), leaves)])
    for wanted, got in zip(*results, strict=True):
        assert torch.allclose(got, wanted, atol=1e-10)


def test_deformable_bands_cover_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 7, 5), (2, 18, 7, 5), (2, 9, 7, 5), (4, 3, 3, 3))
    ]
    whole = deformable_convolution(*inputs)
    gradients = torch.autograd.grad(whole.sin().sum(), inputs)
    monkeypatch.setattr("models.deformable.BAND_VALUES", 2 * 5 * 27 * 3)  # three rows, so bands of 3, 3 and 1
    banded = deformable_convolution(*inputs)
    assert torch.allclose(banded, whole)
    for got, wanted in zip(torch.autograd.grad(banded.sin().sum(), inputs), gradients, strict=True):
        assert torch.allclose(got, wanted)


def test_patches_are_tiles_with_the_channel_slowest() -> None:
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    stacked = stack_patches(x, 2)
    assert stacked.shape == (1, 8, 2, 3)
    for channel, (c, row, column) in enumerate((c, r, k) for c in (0, 1) for r in (0, 1) for k in (0, 1)):
        assert torch.equal(stacked[0, channel], x[0, c, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3])


def test_laplacian_is_the_convolution_it_says() -> None:
    x = torch.randn(2, 1, 11, 8, dtype=torch.float64)
    kernel = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    kernel[..., 2, 2] = -24
    wanted = nn.functional.conv2d(nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), kernel / 48)
    assert torch.allclose(laplacian(x), wanted)


def test_head_equals_its_layers_one_after_another() -> None:
    model = build().double().eval()
    head, view = model.decoder.head, model.decoder.head.view
    pictures, x = images(32).double(), torch.randn(2, head.out.in_channels - view.out_channels, 8, 8).double()
    resized = nn.functional.interpolate(x, (32, 32), mode="bilinear", align_corners=True)
    wanted = head.out(torch.cat([resized, view(pictures, pictures)], 1))
    assert torch.allclose(head(x, pictures), wanted)


def test_report_of_a_clean_load_is_one_sentence() -> None:
    assert LoadReport(loaded=["a", "b"]).summary() == "2 tensors loaded."
