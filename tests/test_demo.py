"""The demo data is always the same, whole, and not to be had by a threshold."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from demo import write_demo
from errors import UserError
from readers import BinaryFolders, check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "demo")


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_it_is_a_faultless_binary_set(folder: Path) -> None:
    reader = BinaryFolders("train+val", root=folder)
    assert [row.count for row in reader.datasets.values()] == [64, 16]
    assert check(reader, progress=False) == []
    samples = [reader.read(i) for i in range(len(reader))]
    shares = [sample.masks.mean() / 255 for sample in samples]
    assert min(shares) > 0.05
    assert max(shares) < 0.7
    assert len({sample.frames[0].tobytes() for sample in samples}) == 80
    assert any(((s.masks > 60) & (s.masks < 200)).mean() > 0.03 for s in samples)  # soft edges
    holes = [cv2.findContours(s.masks // 128, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[1][0, :, 3].max() for s in samples]
    assert sum(parent >= 0 for parent in holes) > 30  # contours with a parent are holes


def test_it_is_drawn_again_alike_and_kept_when_there(folder: Path, tmp_path: Path) -> None:
    start = time.process_time()
    again = write_demo(tmp_path / "again")
    assert time.process_time() - start < 10
    assert digest(again) == digest(folder)
    before = [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    write_demo(again)
    assert before == [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_another_seed_replaces_it_and_a_broken_off_one_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.COUNTS", {"train": 2, "val": 1})
    target = tmp_path / "demo"
    first = digest(write_demo(target))
    assert digest(write_demo(target, seed=1)) != first
    assert digest(write_demo(target)) == first

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        write_demo(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="is no demo data"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def jaccard(found: np.ndarray, alpha: np.ndarray) -> float:
    overlap = (found * alpha).sum()
    return float(overlap / (found.sum() + alpha.sum() - overlap))


def test_no_threshold_finds_the_objects(folder: Path) -> None:
    reader = BinaryFolders("val", root=folder)
    otsu: dict[tuple[int, bool], list[float]] = {}
    fixed: dict[tuple[int, int, bool], list[float]] = {}
    for i in range(len(reader)):
        sample = reader.read(i)
        image, alpha = sample.frames[0], sample.masks / 255
        grey, hsv = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for c, channel in enumerate([grey, *cv2.split(image), *cv2.split(hsv)]):
            above = cv2.threshold(channel, 0, 1, cv2.THRESH_OTSU)[1] > 0
            for inverted in (False, True):
                otsu.setdefault((c, inverted), []).append(jaccard(above ^ inverted, alpha))
                for level in range(0, 256, 16):
                    fixed.setdefault((c, level, inverted), []).append(jaccard((channel > level) ^ inverted, alpha))
    assert max(np.mean(values) for values in otsu.values()) < 0.45
    assert max(np.mean(values) for values in fixed.values()) < 0.45
