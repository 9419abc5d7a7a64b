"""Outlines of COCO json are drawn as pycocotools draws them, and nothing in such a file crashes or leads astray."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as oracle

from readers import check, instance_reader, semantic_reader
from readers.base import DataError
from readers.coco import CocoFile, decode_counts, to_rle
from readers.json_lists import elements
from samples import Objects
from tests.conftest import ROOT, SHARED, needs_shared
from tests.sets import save
from tests.test_readers_semantic import coco_set, problems, square
from transforms import resize

SIZE = (30, 40)


def blob(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(SIZE) < (seed % 5) / 4).astype(np.uint8)


def encoded(mask: np.ndarray) -> tuple[list[int], str]:
    """The run-length code of a mask: uncompressed, by hand, and compressed, by pycocotools."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return runs, oracle.encode(np.asfortranarray(mask))["counts"].decode()


@pytest.mark.parametrize("seed", range(10))
def test_both_kinds_of_run_length_code_are_read_exactly(seed: int) -> None:
    runs, text = encoded(blob(seed))
    assert decode_counts(text) == runs
    for counts in (runs, text):
        code = to_rle({"size": list(SIZE), "counts": counts}, SIZE)
        np.testing.assert_array_equal(oracle.decode(code), blob(seed))


def test_long_runs_are_decoded() -> None:
    wide = np.zeros((3000, 4000), np.uint8)
    wide[5, 3999] = 1
    assert decode_counts(oracle.encode(np.asfortranarray(wide))["counts"].decode()) == [3999 * 3000 + 5, 1, 2994]


def test_polygons_are_drawn_as_pycocotools_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [(rng.uniform(-10, 50, 2 * rng.integers(3, 9))).round(2).tolist() for _ in range(rng.integers(1, 4))]
        expected = oracle.decode(oracle.frPyObjects(polygons, *SIZE)).any(axis=2)
        np.testing.assert_array_equal(oracle.decode(to_rle(polygons, SIZE)), expected)


BAD: dict[str, Any] = {
    "null": None,
    "empty": [],
    "a box": [[1, 2, 3, 4]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]],
    "nan": [[1, 2, 3, float("nan"), 5, 6]],
    "infinite": [[1, 2, 3, float("inf"), 5, 6]],
    "far": [[1, 2, 1e9, 4, 5, 6]],
    "huge": [[1, 2, 10**400, 4, 5, 6]],
    "text": [["1", "2", "3", "4", "5", "6"]],
    "flat": [1, 2, 3, 4, 5, 6],
    "true": [[True, 2, 3, 4, 5, 6]],
    "endless": [[0, 0, 40, 30] * 100_000],
    "no size": {"counts": [1200]},
    "other size": {"size": [40, 30], "counts": [1200]},
    "short": {"size": [30, 40], "counts": [1199]},
    "long": {"size": [30, 40], "counts": [600, 601]},
    "negative": {"size": [30, 40], "counts": [-1, 1201]},
    "fractions": {"size": [30, 40], "counts": [600.0, 600.0]},
    "vast": {"size": [30, 40], "counts": [2**64, 1200]},
    "no counts": {"size": [30, 40]},
    "foreign text": {"size": [30, 40], "counts": "ä ü"},
    "cut text": {"size": [30, 40], "counts": "`U1"[:1]},
    "endless text": {"size": [30, 40], "counts": "o" * 1000},
    "short text": {"size": [30, 40], "counts": encoded(np.ones((5, 5), np.uint8))[1]},
    "a number": 7,
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_crash_or_mislead_pycocotools_never_reaches_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readers.coco.coco_mask", None)
    with pytest.raises(ValueError, match=r"^has "):
        to_rle(BAD[name], SIZE)


def test_faults_name_file_and_annotation(tmp_path: Path) -> None:
    good = {"category_id": 1, "segmentation": square(1, 1, 4)}
    path = coco_set(
        tmp_path,
        [
            good,
            {**good, "segmentation": [[1, 2, 3]]},
            {**good, "segmentation": {"size": [9, 9], "counts": [81]}, "id": "x"},
            {**good, "category_id": 2},
            {**good, "image_id": 99},
            {**good, "image_id": [7]},
        ],
    )
    reader = semantic_reader(str(path))
    picture = tmp_path / "images/train/a.png"
    assert set(problems(reader).splitlines()) == {
        f"{picture}: annotation 3 in {path} has the unknown category 2",
        f"{picture}: annotation 1 in {path} has a polygon of 3 numbers, not of x and y of three points or more",
        f"{picture}: annotation 'x' in {path} has a run-length code of size [9, 9], its picture has [10, 20]",
        f"{path}: annotation 4 is of image 99, which is not in the file",
        f"{path}: annotation 5 is of image [7], which is not in the file",
    }
    with pytest.raises(DataError, match="annotation 3 in"):
        reader.read(0)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "[" * 100_000, '{"images": 3, "annotations": {}, "categories": null}', "\xff"]
)
def test_what_is_no_coco_json_is_one_fault(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    assert "x.json" in problems(semantic_reader("x.json", root=tmp_path))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/{}/secret.png", "a/../../secret.png", "..", "link.png", "a\0b.png"]
)
def test_no_file_name_leads_out_of_the_images(tmp_path: Path, name: str) -> None:
    save(tmp_path / "secret.png", np.zeros((10, 20, 3), np.uint8))
    folder = tmp_path / "set"
    file_name = name.format(tmp_path)
    path = coco_set(folder, [], images=[{"id": 1, "file_name": file_name}, {"id": 3, "file_name": "b.png"}])
    os.symlink(tmp_path / "secret.png", folder / "images/train/link.png")
    reader = semantic_reader(str(path))
    assert [reader.files(i) for i in range(len(reader))] == [[str(folder / "images/train/b.png")]]
    assert len(reader.faults) == 1
    assert "out of" in reader.faults[0].problem or name.startswith("a\0") or name == ".."


def test_ids_of_any_kind_are_sorted_and_repeated_ones_named(tmp_path: Path) -> None:
    categories = [{"id": number, "name": f"n{number}"} for number in ("b", 10, 9, "a", 10, True, None)]
    more = [{"id": 3, "name": "n9"}, 5, {"id": 4, "name": "\ud800"}, {"id": 11, "name": " n 11\n"}]
    content = CocoFile(coco_set(tmp_path, [], categories=[*categories, *more]))
    assert content.categories == {9: "n9", 10: "n10", 11: "n 11", "a": "na", "b": "nb"}
    assert len(content.faults) == 6


# --- anything at all


def mutated(content: Any, rng: random.Random) -> Any:
    """A copy with one to four values, keys or list lengths changed at random."""
    content = copy.deepcopy(content)
    strange: list[Any] = [
        None, True, -1, 0, 1.5, 2**31, 2**63, -(2**70), 1e9, -1e9, float("nan"), float("inf"), "", "x", "\ud800",
        "../x", "a\0", [], {}, [[]], [[1, 2, 3, 4]], {"size": [10, 20], "counts": "0" * 9}, "P`0" * 9, [1] * 9, 10**400,
    ]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        spot = content
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(spot[key], (dict, list)) and rng.random() < 0.8:
                spot = spot[key]
                continue
            action = rng.random()
            if action < 0.15:
                del spot[key]
            elif action < 0.3 and isinstance(spot, list):
                spot.insert(key, copy.deepcopy(spot[rng.choice(keys)]))
            elif action < 0.5 and type(spot[key]) in (int, float) and abs(spot[key]) < 1e300:
                spot[key] = spot[key] * rng.choice([-1, 0.5, 10, 1e12]) + rng.choice([0, 1, 0.25])
            else:
                spot[key] = copy.deepcopy(rng.choice(strange))
            break
    return content


def fuzz(folder: str, first: int, last: int) -> None:
    """Read that many mutations of a good file; in a process of its own, since a fault in C would end it."""
    runs, text = encoded(np.pad(np.ones((4, 4), np.uint8), ((3, 3), (8, 8))))
    segmentations = [square(1, 1, 5), square(5, 2, 7) + square(0, 0, 2)]
    segmentations += [{"size": [10, 20], "counts": counts} for counts in (runs, text)]
    annotations = [{"category_id": 1, "segmentation": row, "bbox": [1, 1, 5, 5]} for row in segmentations]
    path = coco_set(Path(folder), annotations)
    good = json.loads(path.read_text())
    faulty = 0
    for seed in range(first, last):
        path.write_text(json.dumps(mutated(good, random.Random(seed))))
        for reader in (semantic_reader(str(path)), instance_reader(str(path))):
            faults = check(reader, progress=False, workers=1)
            faulty += bool(faults)
            for line in map(str, faults):
                assert "\n" not in line
                line.encode()
            assert all(name.isprintable() for name in reader.class_names)
            broken = {fault.path for fault in faults}
            for index in range(len(reader)):
                if not broken & set(reader.files(index)):
                    sample = reader.read(index)
                    labels = sample.class_ids or [-1] if isinstance(sample.masks, Objects) else sample.masks
                    assert np.max(labels) < len(reader.class_names)
                    layers = resize(sample, (8, 8)).masks
                    assert isinstance(layers, np.ndarray) or np.isfinite(layers.boxes).all()
    print(faulty)


def test_no_mutation_of_a_file_crashes(tmp_path: Path) -> None:
    program = f"from tests.test_readers_coco import fuzz; fuzz({str(tmp_path)!r}, 0, 300)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 300 < int(done.stdout) < 600  # most, not all, leave something wrong for either task


@needs_shared
def test_real_annotations_are_drawn_as_pycocotools_does() -> None:
    from pycocotools.coco import COCO

    crowds = 0
    for path in ("coco_cc_instance/annotations/instances_train.json", "nuclei_instance/annotations/instances_val.json"):
        file = SHARED / "data" / path
        content, coco = CocoFile(file), COCO(str(file))
        assert not content.faults
        for image in content.images[:15]:
            for annotation in content.annotations(image)[0]:
                row = coco.anns[int(annotation.id)]
                assert image.size
                mask = oracle.decode(to_rle(annotation.segmentation, image.size))
                np.testing.assert_array_equal(mask, coco.annToMask(row))
                crowds += annotation.is_crowd
    assert crowds


# --- one element at a time


def drawn(rng: random.Random, depth: int = 0) -> Any:
    """A random value of a json."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind > 6:
        return {f"k{i}\u00e9"[: rng.randint(1, 3)]: drawn(rng, depth + 1) for i in range(rng.randrange(4))}
    if kind == 6:
        return [drawn(rng, depth + 1) for _ in range(rng.randrange(5))]
    text = "".join(rng.choice('ab"\\/\u00e9\u20ac\U0001f600\n\x7f ') for _ in range(rng.randrange(12)))
    return [None, rng.random() < 0.5, rng.randint(-(10**12), 10**12), rng.uniform(-1e9, 1e9), float("inf"), text][kind]


@pytest.mark.parametrize("piece", [1, 7, 50])
def test_elements_are_those_of_pythons_parser_wherever_a_window_ends(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("readers.json_lists.PIECE", piece)
    file = tmp_path / "x.json"
    for seed in range(80):
        rng = random.Random(seed)
        content = {f"k{i}": drawn(rng) for i in range(rng.randrange(5))} | {"list": [drawn(rng) for _ in range(4)]}
        text = json.dumps(content, ensure_ascii=seed % 3 == 0, indent=[None, 1][seed % 2])
        file.write_bytes(b"\xef\xbb\xbf" * (seed % 5 == 0) + text.encode())
        found: dict[str, list[Any]] = {}
        for element in elements(file):
            found.setdefault(element.key, [])
            if element.position >= 0:
                assert element.position == len(found[element.key])
                found[element.key].append(element.value)
                with open(file, "rb") as again:
                    again.seek(element.start)
                    assert json.loads(again.read(element.length)) == element.value
        assert found == {key: value for key, value in content.items() if isinstance(value, list)}


def test_what_pythons_parser_refuses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readers.json_lists.PIECE", 5)
    good = json.dumps({"a": [1, {"b": [True, "text", 2.5]}], "c": {"d": None}, "e": [[], {}]}).encode()
    file = tmp_path / "x.json"
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        content = bytearray(good)
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(2)] = rng.choice(
            [b"", b",", b"]", b"}", b"\xff", b'"', b"\\", b"1", b"x"]
        )
        file.write_bytes(content[: rng.choice([len(content), place])])
        try:
            content = json.loads(file.read_bytes())
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"."):
                list(elements(file))
        else:
            lists = [value for value in content.values() if isinstance(value, list)]
            keys = [element.key for element in elements(file) if element.position < 0]
            assert len(set(keys)) == len(lists)
    assert refused > 150


def test_annotations_may_come_before_their_images(tmp_path: Path) -> None:
    rows = [{"category_id": 1, "segmentation": square(i, 1, 4), "image_id": [7, 3][i % 2]} for i in range(6)]
    path = coco_set(tmp_path, rows)
    content = json.loads(path.read_text())
    for keys in (list(content), list(content)[::-1]):
        path.write_text(json.dumps({key: content[key] for key in keys}))
        file = CocoFile(path)
        assert file.faults == []
        assert [[row.id for row in file.annotations(image)[0]] for image in file.images] == [
            ["0", "2", "4"],
            ["1", "3", "5"],
        ]
    path.write_text(json.dumps(content)[:-1] + ', "images": []}')
    with pytest.raises(DataError, match="it has images twice"):
        CocoFile(path)


def test_annotations_without_an_image_are_one_fault_for_each_image(tmp_path: Path) -> None:
    row = {"category_id": 1, "segmentation": square(1, 1, 4)}
    file = CocoFile(coco_set(tmp_path, [row, *[{**row, "image_id": 99}] * 3]))
    assert [fault.problem for fault in file.faults] == [
        "annotation 1 is of image 99, which is not in the file; so are 2 more"
    ]
