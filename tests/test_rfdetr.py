"""RF-DETR's settings, checkpoints, groups and numerics beyond the goldens."""

from __future__ import annotations

import dataclasses
import json
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from errors import UserError
from models import create_model, infer_settings
from models.rfdetr.attention import sample_maps
from models.rfdetr.encoder import resample
from models.rfdetr.masks import OfficialMaskHead
from models.rfdetr.model import RFDETR
from models.rfdetr.proposals import places
from models.rfdetr.rows import few_rows
from models.rfdetr.variants import DETECTION, SEGMENTATION
from settings import FAMILY_DEFAULTS, RFDETR_VARIANTS, RFDETRSettings
from tests.conftest import SHARED, needs_shared
from tests.test_golden_birefnet import golden

FOLDER = SHARED / "golden" / "rfdetr"
KEY_FILES = sorted(FOLDER.glob("keys_*.json")) if SHARED.is_dir() else []
SMALL: dict[str, Any] = {"num_classes": 3, "num_queries": 5, "groups": 2, "position_side": 4}
FACTORS = ["mask_queries", "mask_features", "encoder_mask_queries", "encoder_mask_features", "mask_bias"]


def build(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return create_model("rfdetr", **(SMALL | settings))


def images(height: int = 48, width: int = 48, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def on_meta(**settings: Any) -> Any:
    with torch.device("meta"):
        return create_model("rfdetr", **settings)


def empty(path: Path) -> dict[str, Tensor]:
    """The checkpoint of a key file, on the meta device."""
    keys = json.loads(path.read_text())
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()}


def randomise(model: Any, seed: int = 0) -> Any:
    """Give every parameter a value: fresh boxes and offsets are 0, which hides mistakes."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.1, 0.5)
    return model


def shallow(model: Any) -> Any:
    """Fewer of the blocks and layers that are all alike, for tracing takes its time with each."""
    encoder = model.backbone
    encoder.blocks, encoder.taps, encoder.global_blocks = encoder.blocks[:4], (0, 1, 2, 3), (1,)
    model.decoder.layers = model.decoder.layers[:2]
    if model.mask_head is not None:
        model.mask_head.blocks = model.mask_head.blocks[:2]
    return model


def loss_of(outputs: dict[str, Any]) -> Tensor:
    """Some scalar that every output has a part in."""
    names = ("logits", "boxes", "encoder_logits", "encoder_boxes")
    total = torch.stack([outputs[name].square().mean() for name in names]).sum()
    if "mask_bias" in outputs:
        for prefix in ("", "encoder_"):
            queries, features = outputs[f"{prefix}mask_queries"], outputs[f"{prefix}mask_features"]
            features = features if prefix else torch.stack(features)
            masks = torch.einsum("...qd,...dhw->...qhw", queries, features) + outputs["mask_bias"]
            total = total + masks.square().mean()
    return total


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_dataclass_names_every_argument() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(RFDETRSettings)}
    arguments = {name: p.default for name, p in signature(RFDETR).parameters.items()}
    assert {name: value for name, value in fields.items() if name not in ("family", "pretrained")} == arguments
    assert set(get_args(RFDETR_VARIANTS)) == {*SEGMENTATION, *DETECTION}


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"'nanoo' with masks \(did you mean nano\?\)"):
        build(variant="nanoo")
    with pytest.raises(UserError, match=r"'base' with masks, which has model.masks false"):
        build(variant="base")
    with pytest.raises(UserError, match=r"'xlarge' without masks, which has model.masks true"):
        build(variant="xlarge", masks=False)
    with pytest.raises(UserError, match="did you mean fpn"):
        build(mask_head="fpnn")
    with pytest.raises(UserError, match="num_classes is 0"):
        build(num_classes=0)
    with pytest.raises(UserError, match=r"40×48 pixels.* multiples of 12 .* such as data.size 48"):
        build().eval()(images(48, 40))


@needs_shared
def test_sizes_are_the_published_ones() -> None:
    rows = json.loads((FOLDER / "variants.json").read_text())["variants"]
    tables = {f"seg_{name}": row for name, row in SEGMENTATION.items()} | DETECTION
    assert set(tables) == set(rows)
    for name, theirs in rows.items():
        ours = tables[name]
        assert (ours.patch, ours.windows, ours.side, ours.layers, ours.queries) == (
            theirs["patch_size"], theirs["num_windows"], theirs["positional_encoding_size"],
            theirs["dec_layers"], theirs["num_queries"],
        )  # fmt: skip
        assert list(ours.global_blocks) == theirs["global_attention_blocks_0based"]
        assert theirs["tap_points"].startswith(f"outputs after blocks (0-based) {list(ours.taps)}")
        assert theirs["official_weights"]["url"].endswith(f"/rfdetr/{ours.weights}")
        assert (ours.width, ours.self_heads, ours.cross_heads, ours.points) == (
            theirs["hidden_dim"], theirs["sa_nheads"], theirs["ca_nheads"], theirs["dec_n_points"],
        )  # fmt: skip


# --- official checkpoints ---------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("path", KEY_FILES, ids=lambda path: path.stem)
def test_names_order_and_shapes(path: Path) -> None:
    theirs = empty(path)
    name = path.stem.removeprefix("keys_")
    settings = infer_settings("rfdetr", theirs)
    assert (settings["variant"], settings["masks"]) == (name.removeprefix("seg_"), name.startswith("seg_"))
    assert (settings["num_classes"], settings["groups"]) == (90, 13)
    model = on_meta(**settings)
    saved = model.official_state_dict()
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in saved.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in theirs.items()
    ]
    assert infer_settings("rfdetr", {"model": {f"model.{key}": tensor for key, tensor in theirs.items()}}) == settings


@needs_shared
@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod."])
def test_weights_come_back_as_they_went_in(prefix: str) -> None:
    weights = golden().make_state_dict(json.loads((FOLDER / "keys_seg_nano.json").read_text()))
    model = create_model("rfdetr", **infer_settings("rfdetr", weights))
    wrapped = {prefix + key: tensor for key, tensor in weights.items()}
    report = model.load_official({"state_dict": wrapped, "hyper_parameters": {"lr": 1e-4}})
    assert sorted(report.loaded) == sorted(weights)
    assert not report.missing + report.unexpected + report.ignored + report.notes + list(report.reshaped)
    saved = model.official_state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in weights.items())


def test_another_number_of_classes_starts_its_heads_anew() -> None:
    source, target = build(1, num_classes=7), build(2)
    report = target.load_official(source.official_state_dict())
    assert set(report.reshaped) == {
        f"{head}.{kind}"
        for head in ("class_embed", *(f"transformer.enc_out_class_embed.{i}" for i in range(2)))
        for kind in ("weight", "bias")
    }
    assert report.reshaped["class_embed.bias"] == ((8,), (4,))
    assert not report.missing + report.unexpected
    assert torch.allclose(target.class_head.bias.sigmoid(), torch.tensor(0.01))
    assert torch.allclose(target.proposals.classify.bias.sigmoid(), torch.tensor(0.01))
    assert torch.equal(target.query_states, source.query_states)


def test_another_size_resamples_the_positions_and_says_so() -> None:
    source, target = build(1), build(2, position_side=6)
    report = target.load_official(source.official_state_dict())
    assert report.notes == ["backbone.0.encoder.encoder.embeddings.position_embeddings resampled from 4×4 to 6×6"]
    wanted = source.backbone._positions(6, 6).flatten(1, 2)
    assert torch.equal(target.backbone.pos_embed[:, 1:], wanted)
    assert torch.equal(target.backbone.pos_embed[:, 0], source.backbone.pos_embed[:, 0])
    # The map that the encoder adds at run time is the same one, so are the results at that size.
    assert torch.allclose(source.eval()(images(72, 72))["logits"], target.eval()(images(72, 72))["logits"], atol=1e-5)


def test_more_queries_and_other_groups_take_what_both_have() -> None:
    source, target = build(1), build(2, num_queries=7, groups=3)
    fresh = target.query_states.detach().clone()
    report = target.load_official(source.official_state_dict())
    assert "query_feat.weight has 2 groups of 5 queries, this model 3 of 7: 2 of 5 loaded" in report.summary()
    assert torch.equal(target.query_states[:2, :5], source.query_states)
    assert torch.equal(target.query_states[:, 5:], fresh[:, 5:])
    assert torch.equal(target.query_states[2], fresh[2])
    assert {key.split(".")[2] for key in report.missing} == {"2"}

    report = source.load_official(target.official_state_dict())
    assert all(key.split(".")[2] == "2" for key in report.ignored if key != "_kp_active_mask")
    assert not report.missing + report.unexpected + list(report.reshaped)
    assert torch.equal(source.query_boxes, target.query_boxes[:2, :5])


def test_masks_that_are_not_wanted_are_ignored() -> None:
    source = on_meta(**SMALL, variant="preview")
    target = on_meta(**SMALL, variant="medium", masks=False)
    assert all(target.ignores(key) for key in source.official_state_dict() if key.startswith("segmentation_head."))
    assert not target.ignores("class_embed.weight")
    assert target.ignores("transformer.enc_output.2.weight")
    assert not target.ignores("transformer.enc_output.1.weight")


def test_a_foreign_checkpoint_is_none() -> None:
    with pytest.raises(UserError, match="no whole RF-DETR: it lacks backbone"):
        infer_settings("rfdetr", {"conv.weight": torch.zeros(3)})
    state = on_meta(**SMALL).official_state_dict()
    short = {key: tensor for key, tensor in state.items() if ".decoder.layers.3." not in key}
    with pytest.raises(UserError, match="3 decoder layers and a width of 256, is none"):
        infer_settings("rfdetr", short)


def test_the_other_mask_head_is_recognised() -> None:
    model = on_meta(**SMALL, mask_head="fpn")
    settings = infer_settings("rfdetr", model.official_state_dict())
    assert settings == SMALL | {"variant": "nano", "masks": True, "mask_head": "fpn"}


@pytest.mark.parametrize("layout", ["transformers", "facebookresearch"])
def test_dinov2_alone_loads(layout: str) -> None:
    source, target = build(1), build(2)
    prefix = "backbone.0.encoder.encoder." if layout == "transformers" else "backbone."
    state = source.official_state_dict() if layout == "transformers" else source.state_dict()
    weights = {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}
    positions, patches = (
        next(key for key in weights if key.endswith(end))
        for end in (("position_embeddings", "pos_embed"), ("projection.weight", "patch_embed.proj.weight"))
    )
    weights[positions] = torch.randn(1, 1 + 37**2, 384)
    weights[patches] = torch.randn(384, 3, 14, 14)
    report = target.load_encoder(weights)
    assert not report.missing + report.unexpected + list(report.reshaped)
    assert report.notes == [f"{positions} resampled from 37×37 to 4×4", f"{patches} resampled from 14×14 to 12×12"]
    kept = ("backbone.pos_embed", "backbone.patch_embed.proj.weight")
    for name, tensor in target.backbone.state_dict(prefix="backbone.").items():
        assert torch.equal(tensor, source.state_dict()[name]) == (name not in kept), name
    assert not torch.equal(target.class_head.weight, source.class_head.weight)


def test_published_weights() -> None:
    assert on_meta(**SMALL).published_weights() == {
        "backbone": "hf-hub:facebook/dinov2-small",
        "official": "https://storage.googleapis.com/rfdetr/rf-detr-seg-n-ft.pth",
    }


# --- training ---------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "official masks": {},
    "pyramid masks": {"mask_head": "fpn"},
    "windows": {"variant": "small"},
    "boxes alone": {"variant": "nano", "masks": False},
    "last block unused": {"variant": "base", "masks": False},
    "one group": {"groups": 1},
    "more queries than places": {"num_queries": 20},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_trains_all_its_parameters(name: str) -> None:
    model = randomise(build(**VARIANTS[name])).train()
    side = 2 * model.stride if 48 % model.stride else 48
    outputs = model(images(side, side))
    layers, groups, queries = model.row.layers, model.groups, model.num_queries
    proposed = min(queries, (side // model.row.patch) ** 2)
    shapes = {
        "logits": (layers, 2, groups * queries, 4),
        "boxes": (layers, 2, groups * queries, 4),
        "encoder_logits": (2, groups * proposed, 4),
        "encoder_boxes": (2, groups * proposed, 4),
    }
    assert {key: tuple(value.shape) for key, value in outputs.items() if "mask" not in key} == shapes
    assert [key for key in outputs if "mask" in key] == (FACTORS if model.mask_head is not None else [])
    loss_of(outputs).backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    predictions = model.eval().predict(images(side, side))
    assert predictions["boxes"].shape == (2, queries, 4)
    assert ("masks" in predictions) == (model.mask_head is not None)
    assert all(value.isfinite().all() for value in predictions.values())


@pytest.mark.parametrize("kind", ["official", "fpn"])
def test_groups_do_not_see_each_other(kind: str) -> None:
    model = randomise(build(mask_head=kind))
    predictions = model.eval().predict(images(48, 72))
    with torch.no_grad():
        outputs = model.train()(images(48, 72))
    masks = torch.einsum("bqd,bdhw->bqhw", outputs["mask_queries"][-1], outputs["mask_features"][-1])
    every = {"logits": outputs["logits"][-1], "boxes": outputs["boxes"][-1], "masks": masks + outputs["mask_bias"]}
    assert predictions["masks"].shape == (2, 5, 12, 18)
    for key, value in predictions.items():
        assert torch.allclose(value, every[key][:, :5], atol=1e-5), key


def test_a_picture_is_seen_alike_in_any_batch() -> None:
    model = randomise(build(variant="small")).eval()
    pictures = images(48, 96, batch=3)
    together = model.predict(pictures)
    for i in range(3):
        alone = model.predict(pictures[i : i + 1])
        assert all(torch.allclose(alone[key][0], value[i], atol=1e-5) for key, value in together.items())


def test_official_rates_and_decay() -> None:
    model = on_meta(num_classes=3)
    defaults = FAMILY_DEFAULTS["rfdetr"]
    factors = [defaults[f"optimizer.{key}"] for key in ("backbone_lr_scale", "layer_decay")]
    encoder = 1.5 * 0.7**2
    for name, wanted in {
        "backbone.pos_embed": encoder * 0.8**14,
        "backbone.patch_embed.proj.weight": encoder * 0.8**14,
        "backbone.blocks.0.attn.qkv.weight": encoder * 0.8**13,
        "backbone.blocks.11.ls2.gamma": encoder * 0.8**2,
        "backbone.norm.weight": encoder,
        "projector.stages.0.0.cv1.conv.weight": 1,
        "decoder.layers.0.linear1.weight": 0.7,
        "decoder.ref_point_head.layers.0.weight": 0.7,
        "query_boxes": 1,
        "class_head.weight": 1,
        "mask_head.bias": 1,
    }.items():
        assert model.lr_scale(name, *factors) == pytest.approx(wanted), name
    old = on_meta(num_classes=3, variant="base", masks=False)
    assert old.lr_scale("backbone.blocks.10.mlp.fc1.weight", 1, 0.8) == pytest.approx(0.8**2)
    decaying = [name for name, _ in model.named_parameters() if model.decays(name)]
    assert {"query_states", "class_head.weight", "proposals.output.weight"} <= set(decaying)
    assert not [name for name in decaying if name.endswith("bias") or "norm" in name or "embed" in name]


def test_drop_path_follows_a_schedule() -> None:
    model = on_meta(num_classes=3, drop_path=0.2)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(1, 12) for _ in range(2)])
    model.set_drop_path(0.0)
    assert not any(m.drop_prob for m in model.modules() if isinstance(m, DropPath))


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = randomise(build()).train()
        model.set_activation_checkpointing(enabled)
        loss_of(model(images())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert torch.allclose(plain, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model = build(num_queries=16).train()  # as many as there are places: none of them is left out by a narrow margin
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images())
    assert rough["boxes"].dtype == rough["encoder_boxes"].dtype == torch.float32
    scores, wanted = (outputs["encoder_logits"].float().sort(1).values for outputs in (rough, exact))
    assert (scores - wanted).abs().max() <= 0.05 * (wanted.max() - wanted.min())
    loss_of(tree_map(Tensor.float, rough)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_compiles_into_one_graph() -> None:
    model = shallow(build()).train()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    plain, traced = model(images(48, 60)), compiled(images(48, 60))
    torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"masks": False, "variant": "small"}], ids=["masks", "boxes"])
def test_exports_a_graph_for_any_batch(settings: dict[str, Any]) -> None:
    model = shallow(randomise(build(**settings))).eval()
    ((module, example, axes),) = model.export_graphs().values()
    program = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    side = model.size
    for batch in (1, 3):
        outputs = model.predict(images(side, side, batch))
        results = dict(zip(list(axes)[1:], program(images(side, side, batch)), strict=True))
        assert set(results) == set(outputs)
        assert all(torch.allclose(results[name], outputs[name], atol=1e-4) for name in outputs)


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(22, 30), (26, 26), (7, 13), (60, 41)])
def test_positions_are_resampled_as_torch_does(size: tuple[int, int]) -> None:
    table = torch.randn(1, 26, 26, 8, dtype=torch.float64)
    wanted = F.interpolate(table.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    assert torch.allclose(resample(table, *size), wanted)


def test_deformable_attention_equals_its_definition() -> None:
    torch.manual_seed(0)
    batch, queries, heads, points, channels = 2, 3, 2, 4, 6
    sizes = [(4, 5), (2, 3)]
    values = torch.randn(batch, 26, channels, dtype=torch.float64)
    where = torch.rand(batch, queries, heads, 2, points, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(batch, queries, heads, 2, points, dtype=torch.float64)
    result = sample_maps(values, sizes, where, weights)

    def value(b: int, head: int, level: int, x: float, y: float) -> Tensor:
        (height, width), first = sizes[level], (0, 20)[level]
        total = torch.zeros(channels // heads, dtype=torch.float64)
        column, row = x * width - 0.5, y * height - 0.5
        for j in range(height):
            for i in range(width):
                share = max(0, 1 - abs(i - column)) * max(0, 1 - abs(j - row))
                total += share * values[b, first + j * width + i].unflatten(0, (heads, -1))[head]
        return total

    for b, q, head in [(0, 0, 0), (1, 2, 1)]:
        parts = [
            weights[b, q, head, level, point] * value(b, head, level, *where[b, q, head, level, point].tolist())
            for level in range(2)
            for point in range(points)
        ]
        wanted = torch.stack(parts).sum(0)
        assert torch.allclose(result[b, q].unflatten(0, (heads, -1))[head], wanted)


def test_places_near_the_border_propose_nothing() -> None:
    boxes, valid = places([(2, 60), (1, 2)], torch.device("cpu"))
    assert torch.allclose(boxes[1], torch.tensor([1.5 / 60, 0.25, 0.05, 0.05]))
    assert torch.allclose(boxes[-1], torch.tensor([0.75, 0.5, 0.1, 0.1]))
    outside = (~valid[:, 0]).nonzero()[:, 0].tolist()
    assert outside == [0, 59, 60, 119]


def test_vectors_and_planes_make_the_official_masks() -> None:
    torch.manual_seed(0)
    head = randomise(OfficialMaskHead(8, 2)).double().train()
    states, feature = torch.randn(2, 1, 5, 8).double(), torch.randn(1, 3, 4, 8).double()
    outputs = head(states, states[0, :, :3], [], feature, (24, 32))
    x = F.interpolate(feature.permute(0, 3, 1, 2), (6, 8), mode="bilinear")

    def masks(x: Tensor, states: Tensor) -> Tensor:
        vectors = head.query_features_proj(head.query_features_block(states))
        return torch.einsum("bchw,bnc->bnhw", head.spatial_features_proj(x), vectors) + head.bias

    wanted = [masks(x, states[0, :, :3])]
    for block, layer in zip(head.blocks, states, strict=True):
        x = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        wanted.append(masks(x, layer))
    planes = torch.stack(outputs["mask_features"])
    found = torch.einsum("lbqd,lbdhw->lbqhw", outputs["mask_queries"], planes) + head.bias
    first = torch.einsum("bqd,bdhw->bqhw", outputs["encoder_mask_queries"], outputs["encoder_mask_features"])
    assert torch.allclose(found, torch.stack(wanted[1:]))
    assert torch.allclose(first + head.bias, wanted[0])
    last = head.eval()(states[1:], states[0, :, :3], [], feature, (24, 32))["masks"]
    assert torch.allclose(last, wanted[2])


def test_few_rows_have_the_gradient_of_all() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    layer[0].bias.requires_grad_(False)
    rows = torch.randn(2, 5, 4, dtype=torch.float64)
    gradients = []
    for function in (layer, lambda x: few_rows(layer, x, layer.parameters())):
        x = rows.clone().requires_grad_()
        layer.zero_grad()
        result = function(x)
        (result[0, 1].square().sum() + result[1, [0, 3]].sum()).backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    layer.zero_grad()
    (few_rows(layer, x, layer.parameters()) * 0).sum().backward()
    assert not layer[2].weight.grad.any()


@needs_shared
def test_official_weights_name_their_classes_as_coco_does() -> None:
    categories = json.loads((SHARED / "data/coco_cc_instance/annotations/instances_val.json").read_text())["categories"]
    with torch.device("meta"):
        names = create_model("rfdetr", num_classes=90).official_class_names
        assert create_model("rfdetr", num_classes=80).official_class_names == ()
    assert len(names) == 91
    assert {number: name for number, name in enumerate(names) if name} == {row["id"]: row["name"] for row in categories}
