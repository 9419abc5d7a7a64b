"""Prompts for SAM 2 from files and flags, and what is said of those that make no sense."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from prompting import MAX_OBJECT, Prompts, fitted, read_prompts
from tests.tiny import photo, save
from writers import write_palette

SIZE = (40, 60)


def write(folder: Path, content: Any) -> str:
    (folder / "prompts.json").write_text(json.dumps(content))
    return str(folder / "prompts.json")


def read(folder: Path, content: Any) -> Prompts:
    return read_prompts(write(folder, content))


def labels() -> np.ndarray:
    drawn = np.zeros(SIZE, np.uint8)
    drawn[5:15, 5:20], drawn[20:30, 30:50] = 1, 7
    return drawn


# ---------------------------------------------------------------- what is meant


def test_a_file_says_points_boxes_and_masks(tmp_path: Path) -> None:
    write_palette(tmp_path / "sub/a.png", labels())
    content = [
        {"frame": 3, "object": 2, "box": [1, 2, 30, 40], "class": "cat"},
        {"points": [[3, 4], [5, 6.5]], "labels": [1, 0]},
        {"object": 2, "points": [[9, 9]]},
        {"frame": 1, "object": 5, "mask": "sub/a.png"},
    ]
    prompts, problems = fitted(read(tmp_path, content).for_all, SIZE, 4)
    assert problems == []
    assert [(p.frame, p.object_id, p.class_name) for p in prompts] == [
        (0, 1, ""),
        (0, 2, "cat"),
        (1, 5, ""),
        (3, 2, "cat"),
    ]
    assert (prompts[0].points, prompts[0].labels, prompts[0].box) == ([[3, 4], [5, 6.5]], [1, 0], None)
    assert (prompts[1].labels, prompts[3].box) == ([1], [1, 2, 30, 40])
    assert (prompts[2].mask == (labels() > 0)).all()


@pytest.mark.parametrize("values", [(1, 7), (255,), (1, 255)])
def test_a_mask_without_an_object_is_of_all_its_values(tmp_path: Path, values: tuple[int, ...]) -> None:
    drawn = labels()
    if len(values) == 1:
        drawn[drawn > 0] = values[0]
    else:
        drawn[drawn == 7] = values[1]
    save(tmp_path / "a.png", drawn)
    prompts, problems = fitted(read(tmp_path, [{"mask": "a.png"}]).for_all, SIZE, 1)
    assert problems == []
    expected = {(1, 7): {1: 1, 7: 7}, (255,): {1: 255}, (1, 255): {1: 1}}[values]  # 255 is none, unless it is all
    assert {p.object_id for p in prompts} == set(expected)
    for prompt in prompts:
        assert (prompt.mask == (drawn == expected[prompt.object_id or 0])).all()


def test_flags_say_the_same(tmp_path: Path) -> None:
    flags = read_prompts(points=["3,4", "2:9,9,0", "5,6.5,0"], boxes=["2:1,2,30,40"], frame=3).for_all
    content = [
        {"frame": 3, "points": [[3, 4], [5, 6.5]], "labels": [1, 0]},
        {"frame": 3, "object": 2, "points": [[9, 9]], "labels": [0], "box": [1, 2, 30, 40]},
    ]
    for one, other in zip(flags, read(tmp_path, content).for_all, strict=True):
        assert (one.frame, one.object_id, one.points, one.labels) == (3, other.object_id, other.points, other.labels)
        assert one.box == other.box


def test_inputs_have_prompts_of_their_own_by_name(tmp_path: Path) -> None:
    box = [{"box": [1, 2, 3, 4]}]
    prompts = read(tmp_path, {"a.mp4": box, "sub/b": box, "c": box})
    inputs = {"a": "in/a.mp4", "sub/b": "in/sub/b.mov", "c": "in/c.jpg"}
    assert set(prompts.for_inputs(inputs)) == set(inputs)
    with pytest.raises(UserError) as error:
        prompts.for_inputs({"a": "in/a.mp4", "d": "in/d.mp4"})
    for words in ("no prompts for in/d.mp4", "prompts for 'sub/b', which is no input", "prompts for 'c'"):
        assert words in str(error.value)
    assert set(read(tmp_path, box).for_inputs(inputs)) == set(inputs)


# ---------------------------------------------------------------- what makes no sense

WRONG: list[tuple[Any, str]] = [
    (3, "is no object"),
    ({}, "needs points, a box or a mask"),
    ({"point": [[1, 2]]}, "unknown key 'point' (did you mean points?)"),
    ({"frame": -1, "box": [1, 2, 3, 4]}, "has the frame -1"),
    ({"frame": True, "box": [1, 2, 3, 4]}, "has the frame True"),
    ({"frame": 0.5, "box": [1, 2, 3, 4]}, "has the frame 0.5"),
    ({"object": 0, "box": [1, 2, 3, 4]}, "has the object 0"),
    ({"object": 255, "box": [1, 2, 3, 4]}, f"from 1 to {MAX_OBJECT}"),
    ({"object": "dog", "box": [1, 2, 3, 4]}, "has the object 'dog'"),
    ({"points": []}, "has the points []"),
    ({"points": [1, 2]}, "has the points [1, 2]"),
    ({"points": [[1, None]]}, "has the points [[1, None]]"),
    ({"points": [[1, float("nan")]]}, "has the points [[1, nan]]"),
    ({"points": [[1, 2]], "labels": [2]}, "has the labels [2]"),
    ({"points": [[1, 2]], "labels": [1, 0]}, "has the labels [1, 0]"),
    ({"labels": [1], "box": [1, 2, 3, 4]}, "has the labels [1]"),
    ({"box": [3, 2, 1, 4]}, "has the box [3, 2, 1, 4]"),
    ({"box": [1, 2, 3]}, "has the box [1, 2, 3]"),
    ({"box": [0, 0, 1e400, 3]}, "has the box [0, 0, inf, 3]"),
    ({"mask": 3}, "has the mask 3"),
    ({"mask": ""}, "has the mask ''"),
    ({"mask": "/etc/passwd"}, "leads out of the folder"),
    ({"mask": "sub/../../a.png"}, "leads out of the folder"),
    ({"mask": "\ud800"}, "leads out of the folder"),
    ({"mask": "a.png", "box": [1, 2, 3, 4]}, "a mask says all"),
    ({"box": [1, 2, 3, 4], "class": ""}, "has the class ''"),
    ({"box": [1, 2, 3, 4], "class": "a\nb"}, "has the class"),
]


def test_all_that_is_wrong_with_a_file_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, [{"box": [1, 2, 3, 4]}, *(entry for entry, _ in WRONG)])
    lines = str(error.value).splitlines()
    for number, (_, problem) in enumerate(WRONG, 1):
        assert any(f"prompts.json, entry {number}: " in line and problem in line for line in lines), problem
    assert not any("entry 0:" in line for line in lines)


def test_all_that_only_the_picture_tells_is_listed_at_once(tmp_path: Path) -> None:
    save(tmp_path / "small.png", labels()[:20])
    save(tmp_path / "empty.png", np.zeros(SIZE, np.uint8))
    save(tmp_path / "colours.png", photo(0, *SIZE))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "code.py").write_text("raise SystemExit")
    masks = {"small": "is 60x20", "empty": "is empty", "colours": "is a coloured picture", "broken": "cannot be read",
             "none": "does not exist"}  # fmt: skip
    content = [
        {"points": [[61, 3]]},
        {"object": 2, "box": [1, 2, 60, 41]},
        {"object": 3, "frame": 4, "box": [1, 2, 3, 4]},
        {"object": 4, "box": [1, 2, 3, 4], "class": "a"},
        {"object": 4, "points": [[1, 2]], "class": "b"},
        *({"mask": f"{name}.png"} for name in masks),
        {"object": 9, "mask": "code.py"},
    ]
    _, problems = fitted(read(tmp_path, content).for_all, SIZE, 4)
    expected = [
        "entry 0: the point 61,3 lies outside the picture, which is 60x40",
        "entry 1: the box 1,2,60,41 reaches out of the picture",
        "entry 2: there is no frame 4: the input has 4 frames, from 0 to 3",
        "entry 4: object 4 has prompts in frame 0 already",
        "entry 4: object 4 is of the class 'b', elsewhere of 'a'",
        *(f"{name}.png: {problem}" for name, problem in masks.items()),
        "code.py: cannot be read as an image",
    ]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


@pytest.mark.parametrize(
    "content", [b"", b"[1", b"\xff", b"[" * 100_000, b"[]", b"{}", b"3", b'{"a": 3}', b'{"a": []}']
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.json"):
        read_prompts(str(tmp_path / "p.json"))


def test_flags_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_prompts(points=["3", "x,y", "1,2,3,4"], boxes=["1,2,3", "1,2,3,4", "1,2,5,6"])
    for text in (
        "--point 3:",
        "--point x,y:",
        "--point 1,2,3,4:",
        "--box 1,2,3:",
        "--box 1,2,5,6: object 1 has another",
    ):
        assert text in str(error.value)
    for flags in (["1,nan"], ["1,2,2"], ["0:1,2"], ["999:1,2"], ["-0.5:1,2"], ["1,inf"]):
        with pytest.raises(UserError, match="--point"):
            read_prompts(points=flags)
    with pytest.raises(UserError, match="--frame is that of"):
        read_prompts(frame=3)
    with pytest.raises(UserError, match="not from both"):
        read_prompts(write(tmp_path, [{"box": [1, 2, 3, 4]}]), points=["1,2"])
    with pytest.raises(UserError, match="cannot be read as json"):
        read_prompts(str(tmp_path / "none.json"))


def test_no_content_of_a_file_is_anything_but_prompts_or_a_sentence(tmp_path: Path) -> None:
    Image.fromarray(labels()).save(tmp_path / "a.png")
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        254,
        1e308,
        10**40,
        "",
        "a.png",
        "../..",
        "\0",
        [],
        [[1, 2]],
        [1, 2, 30, 40],
        {},
        [[]],
    ]
    keys = ["frame", "object", "points", "labels", "box", "mask", "class", "x"]
    draw = random.Random(0)
    for _ in range(2000):
        entries = [{key: draw.choice(values) for key in draw.sample(keys, draw.randint(0, 4))} for _ in range(2)]
        try:
            prompts = read(tmp_path, draw.choice([entries, {"a": entries}, entries[0]]))
            for each in (prompts.for_all, *prompts.by_name.values()):
                fitted(each, SIZE, 3)
        except UserError:
            continue
