"""The fifth family and its task: folders of images by class in, classes and their probabilities out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
from classification import ClassificationCriterion, ClassItem, collate_classes
from demo import KINDS, write_classification_demo
from errors import UserError
from metrics.classification import ClassificationMetric
from mixing import Mix
from models import create_model
from predict import predict
from readers import check
from readers.class_folders import ClassFolders
from samples import Batch, SampleInfo, SampleKey
from tasks import get_task
from tests.helpers import CLASSIFIER, ROOT, assert_same_run, draw_class_set, flags_for, in_process, run_script
from tests.test_resume import StopAt
from tests.tiny import files_below, photo, save


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    return create_model("classifier", **{"backbone": "test_resnet", "num_classes": 3, **settings}).eval()


def batch_of(items: list[ClassItem]) -> Batch:
    samples = [SampleInfo(f"s{i}", "", "set", (8, 8)) for i in range(len(items))]
    return Batch(torch.zeros(len(items), 3, 8, 8), collate_classes(items), samples)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_head_reads_what_the_network_pools() -> None:
    model, images = build(), torch.randn(2, 3, 64, 96)
    assert torch.equal(model(images)["logits"], model.head(model.backbone(images)))
    assert model(images)["logits"].shape == (2, 3)


def test_timms_own_file_loads_key_for_key_and_is_given_back() -> None:
    import timm

    torch.manual_seed(1)
    theirs = timm.create_model("test_resnet", num_classes=3).eval()
    model, images = build(), torch.randn(2, 3, 64, 64)
    report = model.load_official(theirs.state_dict())
    assert [report.missing, report.unexpected, report.reshaped] == [[], [], {}]
    assert torch.allclose(model(images)["logits"], theirs(images), atol=1e-6)
    given = model.official_state_dict()
    assert set(given) == set(theirs.state_dict())
    assert all(torch.equal(given[key], tensor) for key, tensor in theirs.state_dict().items())


def test_the_encoder_of_other_classes_loads_without_a_head() -> None:
    model = build(num_classes=5)
    report = model.load_encoder(build().official_state_dict())
    assert not report.missing
    assert list(report.reshaped) == ["fc.weight", "fc.bias"]
    assert model.published_weights()["backbone"].startswith("hf-hub:timm/test_resnet")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backbone": "resnet19"}, "did you mean resnet1"),
        ({"num_classes": 0}, "there is no data"),
        ({"backbone": "vgg11", "drop_path": 0.1}, "vgg11 has no stochastic depth"),
    ],
)
def test_mistakes_in_its_settings(settings: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=sentence):
        build(**settings)


def test_the_encoder_may_move_slower_than_the_head() -> None:
    rates = {group["lr"] for group in build().parameter_groups(1.0, 0.1, backbone_lr_scale=0.1)}
    assert rates == {1.0, 0.1}


# --- targets, criterion, metric ---------------------------------------------------------------------------------------


def test_the_criterion_is_the_cross_entropy_of_both_classes_by_their_shares() -> None:
    batch = batch_of([ClassItem(np.int64(0)), ClassItem(np.int64(2), np.int64(1), 0.7)])
    logits = torch.randn(2, 3)
    criterion = ClassificationCriterion({"ce": 2.0}, label_smoothing=0.1)
    found = criterion({"logits": logits}, batch, criterion.counts(batch))["ce"]
    soft = torch.tensor([[1.0, 0, 0], [0, 0.3, 0.7]])
    assert torch.allclose(found, 2 * F.cross_entropy(logits, soft, label_smoothing=0.1))


def test_parts_of_a_batch_add_up_to_it() -> None:
    items = [ClassItem(np.int64(i % 3)) for i in range(6)]
    logits, criterion = torch.randn(6, 3), ClassificationCriterion({"ce": 1.0})
    counts = criterion.counts(batch_of(items))
    whole = criterion({"logits": logits}, batch_of(items), counts)["ce"]
    parts = [criterion({"logits": logits[at]}, batch_of(items[at]), counts)["ce"] for at in (slice(2), slice(2, 6))]
    assert torch.allclose(whole, parts[0] + parts[1])


def test_the_metric_equals_its_definitions() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 7), torch.randint(0, 7, (40,))
    batch = batch_of([ClassItem(np.int64(label)) for label in labels])
    metric = ClassificationMetric(class_names=list("abcdefg"))
    metric.update({"logits": logits}, batch)
    metric.reduce()
    scores = metric.compute()
    assert scores["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    in_five = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert scores["top5"] == pytest.approx(in_five)
    assert scores["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    there = labels == 2
    row = metric.per_class()[2]
    assert row["recall"] == pytest.approx((logits.argmax(1)[there] == 2).float().mean().item())
    assert row["share"] == pytest.approx(there.float().mean().item())
    assert metric.confusion().sum() == 40
    assert metric.resolve(["Top-1", "ce"]) == ["top1", "cross_entropy"]
    with pytest.raises(UserError, match="did you mean top1"):
        metric.resolve(["top_1"])


def test_equal_logits_are_no_hit() -> None:
    metric = ClassificationMetric(class_names=["a", "b"])
    metric.update({"logits": torch.zeros(1, 2)}, batch_of([ClassItem(np.int64(0))]))
    assert metric.rows[0].scores["top1"] == 0


@dataclass
class Item:
    image: np.ndarray
    target: ClassItem
    key: SampleKey


def test_cutmix_shares_labels_by_area_and_mixup_by_one_share() -> None:
    keys = [SampleKey(0, i, 0, (32, 32)) for i in range(4)]
    items = [Item(np.full((32, 32, 3), 60 * i, np.uint8), ClassItem(np.int64(i)), key) for i, key in enumerate(keys)]
    for item, mixed in zip(items, Mix({"cutmix": 1.0}, seed=3)(items), strict=True):
        own = (mixed.image[..., 0] == item.image[0, 0, 0]).mean()
        assert mixed.target.share == pytest.approx(own)
        assert mixed.target.labels == item.target.labels
        assert mixed.target.blended == (item.target.labels + 1) % 4
    shares = {mixed.target.share for mixed in Mix({"mixup": 1.0}, seed=3)(items)}
    assert len(shares) == 1


def test_views_are_averaged_in_probability() -> None:
    model, batch = build(), Batch.from_images(torch.randn(2, 3, 64, 64))
    found = predict(model, batch, [1.0])["logits"].softmax(1)
    mirrored = model.predict(batch.images.flip(-1))["logits"].softmax(1)
    assert torch.allclose(found, (model.predict(batch)["logits"].softmax(1) + mirrored) / 2, atol=1e-6)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_are_classes_and_faults_are_listed_at_once(tmp_path: Path) -> None:
    for name in ("set/cat/1.png", "set/cat/sub/2.png", "set/dog/1.png", "other/bird/1.png", "other/dog/9.png"):
        save(tmp_path / name, photo(1, 8, 9))
    reader = ClassFolders("set+other:2", root=tmp_path)
    assert reader.class_names == ["bird", "cat", "dog"]
    assert [reader.sample_id(i) for i in range(len(reader))] == [
        "set/cat/1", "set/cat/sub/2", "set/dog/1", "other/bird/1", "other/dog/9",
    ]  # fmt: skip
    assert [reader.read(i).class_ids for i in range(len(reader))] == [[1], [1], [2], [0], [2]]
    assert reader.datasets["other"].weight == 2
    assert not check(reader, progress=False)

    save(tmp_path / "set" / "stray.png", photo(1, 8, 9))
    (tmp_path / "set" / "empty").mkdir()
    (tmp_path / "set" / "cat" / "3.png").write_bytes(b"no picture")
    faults = [str(fault) for fault in check(ClassFolders("set+other", root=tmp_path, class_names=["cat", "dog"]))]
    for words in ("stray.png: lies outside", "empty: holds no images", "of the class bird, which the tr", "cat/3.png"):
        assert any(words in fault for fault in faults), words
    assert ClassFolders("nothing", root=tmp_path).faults


# --- the programs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with every way of mixing."""
    folder = tmp_path_factory.mktemp("classes")
    draw_class_set(folder / "train", 4)
    draw_class_set(folder / "val", 3, seed=1)
    flags = ["--batch_size", "4", "--epochs", "2", "--lr", "1e-3", "--data.mix", "{cutmix: 0.4, mixup: 0.3}"]
    in_process(*flags_for(folder, folder, "run", *flags, model=CLASSIFIER))
    return folder / "run"


def test_a_run_leaves_scores_classes_and_pictures(run_folder: Path) -> None:
    validation = json.loads((run_folder / "validation.json").read_text())
    assert [row["name"] for row in validation["per_class"]] == ["bar", "disc", "ring"]
    assert len(validation["best"]) == 9
    assert set(validation["best"][0]["panels"]) == {"truth", "prediction"}
    assert "confusion matrix" in validation["figures"]
    assert "4 of the class ring" in (run_folder / "train.log").read_text()


def test_evaluation_and_inference_agree(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "samples.csv"
    quick = ["--data.num_workers", "0", "--mixed_precision", "no"]
    code, out, err = run_script(
        monkeypatch, "evaluate", "--checkpoint", str(run_folder), "--output_samples", str(table), *quick
    )
    assert code == 0, err
    assert "Top-1" in out
    val = run_folder.parent / "val"
    code, _, err = run_script(
        monkeypatch, "inference", "--checkpoint", str(run_folder), "--input", str(val), "--output",
        str(tmp_path / "out"), "--side_by_side", "--device", "cpu", "--mixed_precision", "no",
    )  # fmt: skip
    assert code == 0, err
    files = files_below(tmp_path / "out")
    assert "results_classes.json" in files
    assert {"overlays/disc/0.jpg", "side_by_side/disc/0.jpg"} <= files
    assert not any(name.startswith("masks/") for name in files)
    results = json.loads((tmp_path / "out" / "results_classes.json").read_text())
    first: dict[str, Any] = {}
    total: dict[str, float] = {}
    for row in results:
        first.setdefault(row["image_id"], row)
        total[row["image_id"]] = total.get(row["image_id"], 0) + row["score"]
    assert all(math.isclose(each, 1, abs_tol=1e-5) for each in total.values())
    hits = {name: row["category_id"] == name.split("/")[0] for name, row in first.items()}
    import csv

    with open(table, newline="") as file:
        scored = {row["sample"].removeprefix("val/"): float(row["top1"]) for row in csv.DictReader(file)}
    assert {name: float(hit) for name, hit in hits.items()} == scored


def test_a_stopped_run_goes_on_bit_by_bit(run_folder: Path, tmp_path: Path) -> None:
    data = run_folder.parent
    flags = ["--batch_size", "2", "--epochs", "2", "--train.ema_decay", "0.9", "--model.dropout", "0.2",
             "--data.mix", "{cutmix: 0.4, mixup: 0.3}", "--logging.log_frequency", "1"]  # fmt: skip
    in_process(*flags_for(data, tmp_path / "unbroken", "run", *flags, model=CLASSIFIER))
    command = flags_for(data, tmp_path / "broken", "run", *flags, model=CLASSIFIER)
    in_process(*command, callbacks=[StopAt(10)])
    assert checkpoint.load(tmp_path / "broken" / "run" / "last.pth")["state"]["step"] == 10
    in_process(*command, "--resume")
    assert_same_run(tmp_path / "unbroken" / "run", tmp_path / "broken" / "run")


def test_what_it_cannot_do_is_said(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ["--checkpoint", str(run_folder), "--input", str(run_folder.parent / "val"), "--output", str(tmp_path)]
    code, _, err = run_script(monkeypatch, "inference", *inputs, "--tile")
    assert code == 2
    assert "not for classification" in err


def test_a_checkpoint_of_a_run_is_all_that_export_needs(run_folder: Path, tmp_path: Path) -> None:
    import export
    from settings import ExportSettings

    output = tmp_path / "weights.safetensors"
    export.run(ExportSettings(str(run_folder), "safetensors", output=str(output)))
    model, _ = checkpoint.load_model(run_folder)
    import timm

    theirs = timm.create_model("test_resnet", num_classes=3).eval()
    theirs.load_state_dict(checkpoint.load_weights(output))
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(theirs(images), model(images)["logits"], atol=1e-6)


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_the_demo_draws_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.COUNTS_OF_CLASS", {"train": 2, "val": 1})
    folder = write_classification_demo(tmp_path / "demo")
    reader = ClassFolders("train", root=folder)
    assert reader.class_names == sorted(KINDS)
    assert len(reader) == 2 * len(KINDS)
    pictures = [np.asarray(Image.open(reader.files(i)[0])) for i in range(len(reader))]
    assert {picture.shape for picture in pictures} == {(96, 96, 3)}
    assert get_task("classification").demo_specs == ("train", "val")


@pytest.mark.slow
def test_the_demo_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scores = in_process("--model.family", "classifier", "--experiment_name", "demo", "--device", "cpu")
    assert scores["top1"] > 0.9


# --- the page that builds it ------------------------------------------------------------------------------------------


def test_every_piece_of_the_page_stands_in_the_file_that_it_names() -> None:
    page = (ROOT / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
    pieces = re.findall(r"`([\w/]+\.py)`\n```python\n(.*?)```", page, re.DOTALL)
    assert len(pieces) == page.count("```python")
    for file, piece in pieces:
        assert piece in (ROOT / file).read_text(encoding="utf-8"), f"{file}:\n{piece}"


def test_family_and_task_stay_short() -> None:
    files = [ROOT / "models" / "classifier.py", ROOT / "tasks" / "classification.py"]
    assert sum(bool(line.strip()) for file in files for line in file.read_text().splitlines()) < 120
