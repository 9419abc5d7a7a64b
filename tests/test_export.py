"""Files for other programs: graphs that compute what the model computes, weights that load again, or no file at all."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import export
from errors import UserError
from models import create_model
from models.base import Logits
from models.deformable import DeformableConv2d
from models.sam2.parts import Points
from settings import ExportSettings
from tests.helpers import ROOT, add_toy_family, python, run_script
from tests.tiny import photo, save

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in export.NEEDED), reason="onnx, onnxscript and onnxruntime are not installed"
)

SETTINGS: dict[str, dict[str, Any]] = {
    "toy": {"width": 32},
    "segformer": {"variant": "b0", "num_classes": 3},
    "rfdetr": {"variant": "nano", "num_classes": 3, "groups": 1},
    "classifier": {"backbone": "resnet18", "num_classes": 3},
    "sam2": {"variant": "tiny"},
}


def write_checkpoint(folder: Path, family: str, task: str, **more: Any) -> Path:
    """A run folder of a family with random weights, as train.py leaves it."""
    torch.manual_seed(0)
    model = create_model(family, **SETTINGS[family])
    meta = {"family": family, "settings": SETTINGS[family], "task": task, "size": [96, 64], "normalize": "imagenet",
            "class_names": ["ground", "disc", "bår"], "experiment_name": "run", **more}  # fmt: skip
    folder.mkdir(parents=True)
    checkpoint.save(folder / "best.pth", {"format": 1, "meta": meta, "model": model.state_dict(), "ema": None})
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    add_toy_family()
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "run", "toy", "binary")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("segformer") / "run", "segformer", "semantic")


@pytest.fixture(scope="module")
def graph(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's graph, compared on a picture of its own."""
    folder = tmp_path_factory.mktemp("graph")
    photo_file = save(folder / "photos" / "a.png", photo(0, 70, 90))
    output = folder / "model.onnx"
    assert export.run(ExportSettings(str(toy), output=str(output), images=[str(photo_file)])) == [output]
    return output


# --- graphs -----------------------------------------------------------------------------------------------------------


def documented(*starts: str) -> list[str]:
    """The blocks of code of docs/export.md, word for word: the first one, and those after lines that start so."""
    page = (ROOT / "docs" / "export.md").read_text()
    parts = [page, *(page[page.index(f"\n{start}") :] for start in starts)]
    return [re.findall(r"```python\n(.*?)```", part, re.DOTALL)[0] for part in parts]


def run_documented(graph: Path, picture: Path, *starts: str) -> dict[str, Any]:
    """The names that these blocks leave."""
    names: dict[str, Any] = {}
    for code in documented(*starts):
        code = code.replace("model.onnx", str(graph)).replace("photo.png", str(picture))
        exec(code.replace('f"sam_', f'f"{graph.parent}/sam_'), names)
    return names


def export_random(folder: Path, family: str, size: list[int]) -> tuple[Any, Path]:
    """A model with random weights and its graph, or of several the one that takes pictures."""
    task = {"segformer": "semantic", "sam2": "video", "classifier": "classification", "rfdetr": "instance"}[family]
    run = write_checkpoint(folder / "run", family, task, size=size)
    files = export.run(ExportSettings(str(run), output=str(folder / "sam.onnx")))
    return checkpoint.load_model(run)[0], next(file for file in files if file.stem in ("sam", "sam_image_encoder"))


@needs_onnx
def test_the_documented_lines_run_a_graph_as_the_model_itself(graph: Path, toy: Path, tmp_path: Path) -> None:
    names = run_documented(graph, save(tmp_path / "photo.png", photo(1, 80, 120)), "`binary`")
    model, _ = checkpoint.load_model(toy)
    expected = model.predict(torch.from_numpy(names["images"]))["logits"].numpy()
    assert names["images"].shape == (1, 3, 64, 96)
    assert np.abs(names["outputs"][0] - expected).max() < 1e-4 * np.abs(expected).max()
    assert names["mask"].shape == (80, 120)
    assert 0 <= names["mask"].min() <= names["mask"].max() <= 1


@needs_onnx
@pytest.mark.slow
def test_the_documented_lines_of_other_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = save(tmp_path / "photo.png", photo(1, 80, 120))
    _, graph = export_random(tmp_path / "b", "segformer", [96, 64])
    assert set(np.unique(run_documented(graph, picture, "`semantic`")["labels"])) <= {0, 1, 2}
    _, graph = export_random(tmp_path / "c", "classifier", [64, 64])
    run_documented(graph, picture, "`classification`")
    assert capsys.readouterr().out.splitlines()[-1].split()[0] in ("ground", "disc", "bår")
    _, graph = export_random(tmp_path / "a", "rfdetr", [312, 312])
    names = run_documented(graph, picture, "`instance`")
    assert names["scores"].shape == (100, 3)
    assert all(mask.shape == (80, 120) for _, _, mask in names["objects"])


@needs_onnx
@pytest.mark.slow
def test_the_documented_lines_of_sam2_are_the_model(tmp_path: Path) -> None:
    model, graph = export_random(tmp_path / "s", "sam2", [192, 128])
    picture = save(tmp_path / "photo.png", photo(1, 200, 300))
    names = run_documented(graph, picture, "## SAM 2")
    images = torch.from_numpy(names["images"])
    with torch.no_grad():
        features = model.encode(images)
        click = Points(torch.tensor([[[128.0, 96.0]]]), torch.tensor([[1]]))
        expected = model.segment(model.without_memory(features), features, click, None, multimask=True)
    logits = names["logits"][:, 1:]
    assert np.abs(logits - expected.candidates.numpy()).max() < 1e-3 * np.abs(logits).max()
    assert names["mask"].shape == (200, 300)
    after = run_documented(graph, picture, "## SAM 2", "In a video")
    assert after["logits"].shape == names["logits"].shape
    assert not np.array_equal(after["logits"], names["logits"])


@needs_onnx
def test_the_metadata_say_how_to_use_it(graph: Path) -> None:
    import onnxruntime

    about = onnxruntime.InferenceSession(str(graph)).get_modelmeta().custom_metadata_map
    told = {key: json.loads(value) for key, value in about.items()}
    assert (told["family"], told["task"], told["size"]) == ("toy", "binary", [96, 64])
    assert told["class_names"] == ["ground", "disc", "bår"]
    assert told["mean"] == [0.485, 0.456, 0.406]


@needs_onnx
def test_axes_of_any_length_have_names(graph: Path) -> None:
    import onnxruntime

    (images,) = onnxruntime.InferenceSession(str(graph)).get_inputs()
    assert images.shape == ["batch", 3, "height", "width"]


@needs_onnx
def test_half_precision_halves_the_file_and_keeps_the_interface(graph: Path, toy: Path, tmp_path: Path) -> None:
    output = tmp_path / "half.onnx"
    export.run(ExportSettings(str(toy), output=str(output), precision="fp16"))
    assert output.stat().st_size < 0.65 * graph.stat().st_size
    import onnxruntime

    session = onnxruntime.InferenceSession(str(output))
    assert {each.type for each in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}


@needs_onnx
def test_a_graph_that_computes_something_else_is_not_written(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of the file is changed after the tracing."""
    import onnx

    def spoilt(graph: Any, file: Path, about: Any, settings: Any) -> None:
        write(graph, file, about, settings)
        content = onnx.load(file)
        bias = next(tensor for tensor in content.graph.initializer if tensor.name.endswith("head.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
        onnx.save(content, file)

    write = export.write_graph
    monkeypatch.setattr(export, "write_graph", spoilt)
    output = tmp_path / "deep" / "model.onnx"
    code, _, err = run_script(monkeypatch, "export", "--checkpoint", str(toy), "--output", str(output))
    assert code == 2
    assert "computes something else than the model: logits differs by" in err
    assert not list(output.parent.iterdir())


@needs_onnx
def test_deformable_convolution_of_any_size(tmp_path: Path) -> None:
    """As GridSample, with offsets that lead out of the map; what BiRefNet's attention is made of."""
    torch.manual_seed(0)
    module = DeformableConv2d(4, 6, 3).eval()
    nn.init.normal_(module.offset_conv.weight, std=0.02)
    nn.init.normal_(module.offset_conv.get_parameter("bias"), std=3)
    nn.init.normal_(module.modulator_conv.weight)
    axes = {0: "batch", 2: "height", 3: "width"}
    one = export.Graph(module, (torch.randn(2, 4, 8, 12),), {"maps": axes, "sums": axes})
    file = tmp_path / "deformable.onnx"
    export.write_graph(one, file, {}, ExportSettings())
    for shape in ((1, 4, 8, 12), (3, 4, 17, 5)):
        assert export.check(one, file, [torch.randn(shape)], "fp32")
    import onnx

    assert "GridSample" in {node.op_type for node in onnx.load(file).graph.node}
    export.halve(file, external=False)
    assert export.check(one, file, [torch.randn(1, 4, 8, 300)], "fp16")  # whose positions half precision cannot tell


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [("birefnet", {"backbone": "pvt_v2_b0"}), ("segformer", {"variant": "b0", "num_classes": 3})],
)
def test_whole_models_of_any_size(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(family, **settings).eval()
    ((module, example, axes),) = model.export_graphs().values()
    assert isinstance(module, Logits)
    graph, file = export.Graph(module, example, axes), tmp_path / "model.onnx"
    export.write_graph(graph, file, {}, ExportSettings())
    for shape in ((1, 3, 96, 64), (3, 3, 160, 224)):
        export.check(graph, file, [torch.randn(shape)], "fp32")


def test_inputs_that_are_no_pictures_vary_around_their_example() -> None:
    """As the prompts of a decoder are: axes of one name have one length."""
    axes = {"images": {0: "batch"}, "points": {0: "batch", 1: "points"}, "labels": {0: "batch", 1: "points"}, "out": {}}
    example = (torch.zeros(2, 3, 32, 32), torch.full((2, 2, 2), 100.0), torch.ones(2, 2, dtype=torch.int64))
    graph = export.Graph(nn.Identity(), example, axes)
    usual, further = export.trial_sizes(graph, {"size": [32, 32]}, 32)
    assert (usual, further) == ({"batch": 1, "points": 2}, {"batch": 3, "points": 3})
    images, points, labels = export.draw_inputs(graph, further, {}, ExportSettings(), seed=0)
    assert images.shape == (3, 3, 32, 32)
    assert points.shape == (3, 3, 2)
    assert (points - 100).abs().max() < 6
    assert labels.tolist() == [[1, 1, 1]] * 3
    assert export.fixed_size(graph) == [32, 32]


class Choice(nn.Module):
    """One of two answers, as a share of the input says: of a choice among equals little is left after a rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.mean() > 0, x + 1, x - 1)


@pytest.mark.parametrize(("level", "tells"), [(0.0, False), (1.0, True)])
def test_inputs_that_a_rounding_decides_tell_nothing(
    monkeypatch: pytest.MonkeyPatch, level: float, tells: bool
) -> None:
    graph = export.Graph(Choice(), (torch.zeros(2, 3),), {"x": {}, "y": {}})
    inputs = [torch.full((2, 3), level)]
    inputs[0][0] += torch.tensor([1.0, -1.0, 0.0])
    other = inputs[0].numpy() + (1 if level == 0 else -1)  # than PyTorch chooses
    monkeypatch.setattr(export, "run_onnx", lambda file, inputs, outputs: ([other], 0.0))
    if not tells:
        assert not export.check(graph, Path("x.onnx"), inputs, "fp32")
        return
    with pytest.raises(UserError, match="computes something else"):
        export.check(graph, Path("x.onnx"), inputs, "fp32")


@needs_onnx
def test_a_graph_that_cannot_be_compared_is_not_written(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "check", lambda *_: False)
    monkeypatch.setattr(export, "write_graph", lambda graph, file, *_: file.touch())
    monkeypatch.setattr(export, "opset_of", lambda file: 20)
    with pytest.raises(UserError, match="cannot be compared: the model's own outputs jump"):
        export.run(ExportSettings(str(toy), output=str(tmp_path / "x.onnx")))
    assert not list(tmp_path.iterdir())


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layout", "key"),
    [("safetensors", "", "decode_head.classifier.weight"), ("pth", "nvlabs", "decode_head.linear_pred.weight")],
)
def test_official_weights_load_again(segformer: Path, tmp_path: Path, kind: str, layout: str, key: str) -> None:
    output = tmp_path / f"weights.{kind}"
    export.run(ExportSettings(str(segformer), kind, output=str(output), layout=layout))  # type: ignore[arg-type]
    assert key in checkpoint.load_weights(output)
    original, _ = checkpoint.load_model(segformer)
    again, meta = checkpoint.load_model(output)
    assert (meta["family"], meta["settings"]["num_classes"]) == ("segformer", 3)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in original.state_dict().items())


def test_half_precision_weights_are_the_rounded_ones(segformer: Path, tmp_path: Path) -> None:
    output = tmp_path / "weights.safetensors"
    export.run(ExportSettings(str(segformer), "safetensors", output=str(output), precision="fp16"))
    original, again = checkpoint.load_model(segformer)[0].state_dict(), checkpoint.load_model(output)[0].state_dict()
    floats = [name for name, tensor in original.items() if tensor.is_floating_point()]
    assert all(torch.equal(again[name], original[name].half().float()) for name in floats)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "nowhere"], "no checkpoint nowhere"),
        (["--checkpoint", "RUN", "--output", "out.pt"], "must end in .onnx"),
        (["--checkpoint", "RUN/best.pth", "--format", "pth", "--output", "RUN/best.pth"], "is the checkpoint"),
        (["--checkpoint", "RUN", "--format", "pth", "--layout", "nvlab"], "did you mean nvlabs?"),
        (["--checkpoint", "RUN", "--format", "onx"], "did you mean onnx?"),
        (["--checkpoint", "RUN", "--opset", "9"], "at least 18"),
        (["--checkpoint", "RUN", "--images", "nothing", "--output", "OUT/x.onnx"], "is no image or video"),
    ],
)
def test_mistakes_end_in_a_sentence(
    segformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    before = (segformer / "best.pth").read_bytes()
    words = [word.replace("RUN", str(segformer)).replace("OUT", str(tmp_path)) for word in arguments]
    code, _, err = run_script(monkeypatch, "export", *words)
    assert code == 2
    assert sentence in err
    assert not list(tmp_path.iterdir())
    assert (segformer / "best.pth").read_bytes() == before


def test_a_family_with_one_layout_has_no_other(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layout nvlabs: this family's weights have one layout"):
        export.run(ExportSettings(str(toy), "pth", output=str(tmp_path / "x.pth"), layout="nvlabs"))
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="needs onnxscript, which is not installed: pip install onnx onnxscript"):
        export.run(ExportSettings("anything"))


def test_help_answers_without_torch() -> None:
    result = python("-X", "importtime", "export.py", "--help")
    assert "--precision" in result.stdout
    assert "| torch\n" not in result.stderr
