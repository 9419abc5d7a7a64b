"""Objects from the command line to the files: training, resuming, scores, pictures, COCO results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import checkpoint
from instance_pictures import MISSED, RIGHT, WRONG, draw_objects, draw_outcome, id_map
from instances import Detections
from models.rfdetr import variants
from samples import Objects, Sample
from tasks import Scored, get_task
from tasks.instance import coco_results, crops, result_options
from tests.helpers import RFDETR, draw_object_set, draw_set, flags_for, records, run_script, tiny_rfdetr

FAST = [
    "--batch_size", "4", "--lr", "2e-3", "--optimizer.layer_decay", "1", "--optimizer.backbone_lr_scale", "1",
    "--train.ema_decay", "0.8", "--data.augment", "[]", "--scheduler.name", "cosine", "--logging.log_frequency", "3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.SEGMENTATION, "nano", tiny_rfdetr())
    monkeypatch.setitem(variants.DETECTION, "nano", tiny_rfdetr())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of one to three objects and one of none, to be learnt by heart."""
    folder = tmp_path_factory.mktemp("data")
    draw_object_set(folder / "train", 5, seed=3)
    (folder / "val").symlink_to(folder / "train", target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.SEGMENTATION, "nano", tiny_rfdetr())
        runs = tmp_path_factory.mktemp("runs")
        flags = flags_for(data, runs, "objects", *FAST, "--epochs", "90", "--eval_each_epoch", "30", model=RFDETR)
        code, out, err = run_script(patch, "train", *flags)
        assert code == 0, err
        assert "class" in out
        return runs / "objects"


def test_a_run_learns_every_term_falls_and_pictures_are_kept(run: Path) -> None:
    rows = records(run)
    lines = [row for row in rows if row["kind"] == "train"]
    for term in ("box", "giou", "mask", "dice"):  # that of classes first rises with the overlap that it asks for
        assert lines[-1][f"train/loss/{term}"] < 0.8 * lines[0][f"train/loss/{term}"], term
    best = max((row for row in rows if row["kind"] == "val"), key=lambda row: row["val/mask_ap"])
    assert best["val/mask_ap50"] > 0.5
    assert (run / "report.html").read_text().count("outcome") > 1
    meta = checkpoint.load(run / "best.pth")["meta"]
    assert meta["validation"]["f1_threshold"] == pytest.approx(best["val/f1_threshold"])
    assert meta["class_names"] == ["disc", "bar"]
    assert meta["file_ids"] == [0, 1]
    assert result_options(meta, None, 7) == {
        "threshold": meta["validation"]["f1_threshold"], "top_k": 7, "num_classes": 2,
    }  # fmt: skip


def test_scores_and_results_of_a_checkpoint(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written as COCO results scores, read again as any program's, what the checkpoint scored."""
    given = ["--checkpoint", str(run), "--data.test", str(data / "val"), "--num_workers", "0"]
    table, again = tmp_path / "a.csv", tmp_path / "b.csv"
    results = tmp_path / "out" / "found"
    code, _, err = run_script(monkeypatch, "evaluate", *given, "--output", str(table), "--output_results", str(results))
    assert code == 0, err
    truth = write_coco(data / "val", tmp_path / "truth.json")
    found = [f"{results}_segm.json", "--ground_truth", str(truth), "--output", str(again)]
    code, _, err = run_script(monkeypatch, "evaluate", "--predictions", *found)
    assert code == 0, err
    first, second = (path.read_text().splitlines() for path in (table, again))
    ours, theirs = (dict(zip(each[0].split(","), each[1].split(","), strict=True)) for each in (first, second))
    for name in ("mask_ap", "mask_ap50", "mask_ar100"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-9), name


def write_coco(folder: Path, file: Path) -> Path:
    """The samples of a reader as a COCO json, its image ids being the names of the images."""
    reader = get_task("instance").reader(str(folder))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(reader)):
        sample = reader.read(index)
        height, width = sample.frames[0].shape[:2]
        name = reader.image_id(index)
        images.append({"id": name, "file_name": f"{name}.png", "height": height, "width": width})
        for label, code, box, area in zip(
            sample.class_ids, sample.masks.codes, sample.masks.boxes, sample.masks.areas, strict=True
        ):
            left, top, right, bottom = map(float, box)
            annotations.append({
                "id": len(annotations) + 1, "image_id": name, "category_id": label, "iscrowd": 0, "area": float(area),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": {**code, "counts": code["counts"].decode()},
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(reader.class_names)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def test_inference_writes_masks_overlays_crops_and_results(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = ["--checkpoint", str(run), "--input", str(data / "train" / "images"), "--output", str(out)]
    code, _, err = run_script(
        monkeypatch, "inference", *given, "--crops", "--threshold", "0.01", "--top_k", "3", "--tta"
    )
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {
        "masks", "colors", "overlays", "crops", "results_bbox.json", "results_segm.json",
    }  # fmt: skip
    segm, boxes = (json.loads((out / f"results_{kind}.json").read_text()) for kind in ("segm", "bbox"))
    assert len(segm) == len(boxes) > 0
    assert all("bbox" not in row for row in segm)
    ids = np.array(Image.open(out / "masks" / "01.png"))
    mine = [row for row in segm if row["image_id"] == 1]
    assert ids.shape == (80, 96)
    assert ids.max() <= len(mine) <= 3
    assert ((ids == 1) == coco_mask.decode(mine[0]["segmentation"]).astype(bool)).all()
    crop = np.array(Image.open(next((out / "crops" / "01").glob("001_*.png"))))
    assert crop.shape[2] == 4
    assert crop[..., 3].sum() == 255 * (ids == 1)[boxed(boxes, 1)].sum()
    code, _, err = run_script(monkeypatch, "inference", *given, "--tile")
    assert code == 2
    assert "--tile" in err


def boxed(boxes: list[dict[str, Any]], image_id: int) -> tuple[slice, slice]:
    left, top, width, height = next(row["bbox"] for row in boxes if row["image_id"] == image_id)
    return (slice(int(np.floor(top)), int(np.ceil(top + height))),
            slice(int(np.floor(left)), int(np.ceil(left + width))))  # fmt: skip


def test_boxes_alone_and_padded_pictures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_for(
        data, tmp_path, "boxes", *FAST, "--epochs", "1", "--no-model.masks", "--data.resize", "pad", model=RFDETR
    )
    code, _, err = run_script(monkeypatch, "train", *flags)
    assert code == 0, err
    assert "mask" not in "".join(str(row) for row in records(tmp_path / "boxes"))
    given = ["--checkpoint", str(tmp_path / "boxes"), "--input", str(data / "train" / "images" / "01.png")]
    code, _, err = run_script(monkeypatch, "inference", *given, "--output", str(tmp_path / "o"), "--threshold", "0")
    assert code == 0, err
    assert not (tmp_path / "o" / "results_segm.json").exists()
    found = json.loads((tmp_path / "o" / "results_bbox.json").read_text())
    assert len(found) == 24  # queries x classes, the unused last logit aside
    ends = np.array([[x + w, y + h] for x, y, w, h in (row["bbox"] for row in found)])
    assert (ends <= np.array([96, 80]) + 1e-3).all()


def test_stretching_is_all_that_other_tasks_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_set(tmp_path / "train", 2)
    draw_set(tmp_path / "val", 1)
    code, _, err = run_script(monkeypatch, "train", *flags_for(tmp_path, tmp_path, "run", "--data.resize", "pad"))
    assert code == 2
    assert "data.resize" in err


# ---------------------------------------------------------------- pictures and records of known objects


def block(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> dict[str, Any]:
    mask = np.zeros(size, np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return coco_mask.encode(mask)


SIZE = (40, 60)
BOXES = np.array([[5, 5, 15, 20], [30, 10, 50, 30]], np.float32)
CODES = [block(SIZE, 5, 5, 20, 15), block(SIZE, 10, 30, 30, 50)]


def found_in(boxes: np.ndarray, codes: list[Any] | None, labels: list[int], scores: list[float]) -> Detections:
    return Detections(np.array(labels), np.array(scores, np.float32), boxes, codes, SIZE)


def test_the_first_object_is_on_top() -> None:
    codes = [*CODES, block(SIZE, 0, 0, 40, 60)]
    ids = id_map(np.concatenate([BOXES, [[0, 0, 60, 40]]]), codes, SIZE)
    assert (ids[10, 10], ids[20, 40], ids[0, 0], ids.dtype) == (1, 2, 3, np.uint8)
    assert id_map(BOXES, None, SIZE)[19, 14] == 1
    assert id_map(np.zeros((0, 4)), [], SIZE).max() == 0


def test_outcomes_have_their_colours() -> None:
    """One is found, one is found as another class, one lies within a crowd, one is nowhere."""
    truth = Objects([*CODES, block(SIZE, 30, 0, 40, 20)], np.zeros((3, 4)), np.array([False, False, True]), np.ones(3))
    boxes = np.array([[5, 5, 15, 20], [30, 10, 50, 30], [2, 32, 12, 38], [52, 0, 60, 8]], np.float32)
    codes = [*CODES, block(SIZE, 32, 2, 38, 12), block(SIZE, 0, 52, 8, 60)]
    found = found_in(boxes, codes, [0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6])
    picture = draw_outcome(np.zeros((*SIZE, 3), np.uint8), np.zeros((3, 4)), truth, [0, 1, 0], found)
    for place, color in (((10, 10), RIGHT), ((4, 56), WRONG)):
        np.testing.assert_allclose(picture[place], np.array(color) * 0.6, atol=2)
    orange_on_blue = np.array(WRONG) * 0.6 + np.array(MISSED) * 0.6 * 0.4
    np.testing.assert_allclose(picture[20, 40], orange_on_blue, atol=2)
    assert np.ptp(picture[34, 5].astype(int)) == 0  # what lies in a crowd is the crowd's grey


def test_panels_scale_the_truth_and_take_the_best_threshold() -> None:
    image = np.full((80, 120, 3), 90, np.uint8)
    codes = [cv2_code(code) for code in CODES]
    sample = Sample([image], Objects(codes, BOXES * 2, np.zeros(2, bool), np.ones(2)), [0, 1])
    found = found_in(BOXES, CODES, [0, 1], [0.9, 0.3])
    for threshold, is_found in ((0.2, True), (0.5, False)):
        scored = Scored(sample, image[::2, ::2].copy(), found, ["disc", "bar"], {"f1_threshold": threshold})
        panels = get_task("instance").panels(scored)
        assert list(panels) == ["image", "truth", "prediction", "outcome"]
        assert {panel.shape for panel in panels.values()} == {(40, 60, 3)}
        np.testing.assert_allclose(
            panels["outcome"][20, 40], np.array(RIGHT if is_found else MISSED) * 0.6 + 12, atol=4
        )
    outline = panels["truth"][29, 40]  # the lower edge of the second box, halved
    assert not (outline == 90).all()


def cv2_code(code: dict[str, Any]) -> dict[str, Any]:
    doubled = cv2.resize(coco_mask.decode(code), (120, 80), interpolation=cv2.INTER_NEAREST)
    return coco_mask.encode(np.asfortranarray(doubled))


def test_records_are_what_pycocotools_reads() -> None:
    found = found_in(BOXES, CODES, [1, 0], [0.75, 0.5])
    results = coco_results(found, 42, [7, "b"])
    assert results["bbox"][0] == {"image_id": 42, "category_id": "b", "bbox": [5.0, 5.0, 10.0, 15.0], "score": 0.75}
    assert results["segm"][1]["category_id"] == 7
    assert coco_mask.area(results["segm"][1]["segmentation"]) == 400
    json.dumps(results)
    assert list(coco_results(found_in(BOXES, None, [1, 0], [0.75, 0.5]), 42, [])) == ["bbox"]


def test_crops_stay_in_their_folder() -> None:
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    boxes = np.array([[5.2, 5.7, 15, 20], [9, 9, 9, 9]], np.float32)
    found = found_in(boxes, None, [0, 1], [0.9, 0.8])
    (name, crop), = crops(image, found, ["../../x y", "b"])  # fmt: skip
    assert name == "001_-x-y"
    assert crop.shape == (15, 10, 3)


def test_many_objects_have_no_names_over_them() -> None:
    image = np.full((200, 200, 3), 90, np.uint8)
    boxes = np.array([[i, i, i + 3, i + 3] for i in range(0, 140, 2)], np.float32)
    named, unnamed = (draw_objects(image, each, None, ["name"] * len(each)) for each in (boxes[:1], boxes))
    assert (named[:, 20:30] != 90).any()
    assert (unnamed[:5, 30:] == 90).all()
