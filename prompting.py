"""Which objects SAM 2 is to follow: prompts from a .json file or from flags, proven before any work begins.

A file of prompts is a list, for every input, or a list for each of several inputs by its name:

    [{"frame": 0, "object": 1, "points": [[310, 180], [300, 40]], "labels": [1, 0], "class": "dog"},
     {"frame": 12, "object": 1, "points": [[290, 60]], "labels": [0]},
     {"object": 2, "box": [40, 60, 200, 310]},
     {"object": 3, "mask": "dog.png"}]

    {"clip.mp4": [{"box": [40, 60, 200, 310]}], "other.mp4": [{"frame": 3, "points": [[5, 8]]}]}

Each entry is what one object is shown by in one frame: points (labelled 1 on it, which is the default, and 0 beside
it), a box (left, top, right, bottom), both, or a mask alone. Frames are counted from 0 and objects from 1, which are
the defaults. Pixels are those of the picture. A mask is a picture of the frame's size, in the file's folder or below:
of an `object` everything in it but black; without `object` each value is an object of that number, as in the
annotations of DAVIS, of which 255 is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from errors import UserError, nearest
from readers import DataError, Fault, read_alpha
from readers.images import read_labels
from samples import Size

KEYS = ("frame", "object", "points", "labels", "box", "mask", "class")
MAX_OBJECT = 254  # that the pixels of a palette picture can hold, 255 being none
POINT = re.compile(r"(?:(\d{1,9}):)?([^,:]+),([^,:]+)(?:,([^,:]+))?")
BOX = re.compile(r"(?:(\d{1,9}):)?([^,:]+),([^,:]+),([^,:]+),([^,:]+)")


@dataclass(frozen=True)
class Prompt:
    """What one object is shown by in one frame, all in pixels of the picture."""

    frame: int
    object_id: int | None  # None: each value of the mask is an object
    points: Sequence[Sequence[float]] = ()  # x, y
    labels: Sequence[int] = ()
    box: Sequence[float] | None = None  # left, top, right, bottom
    mask_path: str = ""
    class_name: str = ""
    where: str = ""  # it was read
    mask: np.ndarray | None = None  # (H, W) bool, once it was read


@dataclass(frozen=True)
class Prompts:
    """Prompts for every input, or by the names of inputs."""

    for_all: list[Prompt]
    by_name: dict[str, list[Prompt]]
    file: str = ""

    def __bool__(self) -> bool:
        return bool(self.for_all or self.by_name)

    def for_inputs(self, inputs: Mapping[str, str]) -> dict[str, list[Prompt]]:
        """The prompts of each input {name of its outputs: path}, which the file calls by that name, or by the last part
        of the path, with or without its suffix. Raises `UserError` for names that are none and inputs without any."""
        if not self.by_name:
            return dict.fromkeys(inputs, self.for_all)
        found: dict[str, list[Prompt]] = {}
        used = set()
        for name, path in inputs.items():
            known = (name, PurePath(path).name, PurePath(path).stem)
            key = next((each for each in known if each in self.by_name), None)
            if key is not None:
                found[name] = self.by_name[key]
                used.add(key)
        problems = [f"{self.file} has prompts for {key!r}, which is no input{nearest(key, inputs)}"
                    for key in self.by_name if key not in used]  # fmt: skip
        problems += [f"{self.file} has no prompts for {path}" for name, path in inputs.items() if name not in found]
        refuse(problems)
        return found


def refuse(problems: Sequence[str]) -> None:
    """All that is wrong with the prompts as one `UserError`."""
    if problems:
        raise UserError("\n".join(["the prompts cannot be used as they are:", *(f"  {each}" for each in problems)]))


# ---------------------------------------------------------------- reading


def read_prompts(file: str = "", *, points: Sequence[str] = (), boxes: Sequence[str] = (), frame: int = 0) -> Prompts:
    """Prompts from a .json file, or from flags: points `x,y` or `x,y,label` and boxes `left,top,right,bottom`, each
    with the number of the object and a colon in front where it is not 1, all in one frame.

    Raises:
        UserError: everything that is wrong with them but for what only the pictures can tell.
    """
    problems: list[str] = []
    if file and (points or boxes or frame):
        raise UserError("prompts come from --prompts, or from --point, --box and --frame, but not from both")
    if frame and not (points or boxes):
        raise UserError("--frame is that of --point and --box: give one of them, too")
    if not file:
        parsed_flags = _parse_all(_entries(points, boxes, frame, problems), "", Path(), problems)
        refuse(problems)
        return Prompts(parsed_flags, {})
    content = _load(Path(file))
    folder = Path(file).parent
    lists = content if isinstance(content, dict) else {"": content}
    parsed = {}
    for name, entries in lists.items():
        where = f"{file}, {name}" if name else file
        if isinstance(entries, list) and entries:
            numbered = {f"entry {number}": entry for number, entry in enumerate(entries)}
            parsed[name] = _parse_all(numbered, where, folder, problems)
        else:
            problems.append(f"{where}: is no list of prompts with any in it")
    if not lists:
        problems.append(f"{file}: holds no prompts")
    refuse(problems)
    return Prompts([], parsed, file) if isinstance(content, dict) else Prompts(parsed[""], {}, file)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--prompts {file} cannot be read as json ({reason})") from None


def _entries(points: Sequence[str], boxes: Sequence[str], frame: int, problems: list[str]) -> dict[str, Any]:
    """What flags say, as entries of a file."""
    entries: dict[int, dict[str, Any]] = {}

    def entry(number: str | None) -> dict[str, Any]:
        object_id = int(number or 1)
        return entries.setdefault(object_id, {"frame": frame, "object": object_id})

    for text in points:
        match = POINT.fullmatch(text)
        if not match or None in (place := [_number(match[2]), _number(match[3])]):
            problems.append(f"--point {text}: is none; write x,y or x,y,label, with 2: in front for the object 2")
            continue
        chosen = entry(match[1])
        chosen.setdefault("points", []).append(place)
        chosen.setdefault("labels", []).append(_number(match[4] or "1"))
    for text in boxes:
        match = BOX.fullmatch(text)
        if not match or None in (sides := [_number(match[part]) for part in (2, 3, 4, 5)]):
            problems.append(f"--box {text}: is none; write left,top,right,bottom, with 2: in front for the object 2")
        elif "box" in (chosen := entry(match[1])):
            problems.append(f"--box {text}: object {chosen['object']} has another one")
        else:
            chosen["box"] = sides
    return {f"--point and --box of object {number}": each for number, each in entries.items()}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _parse_all(entries: Mapping[str, Any], where: str, folder: Path, problems: list[str]) -> list[Prompt]:
    """The entries that are as they should be; what is wrong with others goes to `problems`."""
    prompts = []
    for name, entry in entries.items():
        place = f"{where}, {name}" if where else name
        wrong = list(_problems(entry)) or list(_way_out(entry, folder))
        if not wrong:
            prompts.append(_parse(entry, place, folder))
        problems += [f"{place}: {problem}" for problem in wrong]
    return prompts


def _parse(entry: Mapping[str, Any], where: str, folder: Path) -> Prompt:
    mask = entry.get("mask")
    points = entry.get("points", [])
    return Prompt(
        frame=entry.get("frame", 0),
        object_id=entry.get("object", None if mask else 1),
        points=points,
        labels=entry.get("labels", [1] * len(points)),
        box=entry.get("box"),
        mask_path=str(folder / mask) if mask else "",
        class_name=entry.get("class", ""),
        where=where,
    )


def _problems(entry: Any) -> Iterator[str]:
    """What is wrong with an entry, whatever the picture."""
    if not isinstance(entry, dict):
        yield 'is no object, as {"frame": 0, "object": 1, "points": [[310, 180]]}'
        return
    for key in entry:
        if key not in KEYS:
            yield f"has the unknown key {key!r}{nearest(key, KEYS)}; known: {', '.join(KEYS)}"
    frame, object_id = entry.get("frame", 0), entry.get("object", 1)
    points, labels, mask = (entry.get(key) for key in ("points", "labels", "mask"))
    box: Any = entry.get("box")
    if type(frame) is not int or frame < 0:
        yield f"has the frame {_shown(frame)}; frames are whole numbers from 0 on"
    if type(object_id) is not int or not 1 <= object_id <= MAX_OBJECT:
        yield f"has the object {_shown(object_id)}; objects are whole numbers from 1 to {MAX_OBJECT}"
    if not any(key in entry for key in ("points", "box", "mask")):
        yield "needs points, a box or a mask"
    if "points" in entry and not (isinstance(points, list) and points and all(_are_numbers(p, 2) for p in points)):
        yield f"has the points {_shown(points)}; points are a list of [x, y]"
    elif "labels" in entry and not (
        isinstance(labels, list)
        and len(labels) == len(points or [])
        and all(type(label) is int and label in (0, 1) for label in labels)
    ):
        yield f"has the labels {_shown(labels)}; each point has one, 1 (on the object) or 0 (beside it)"
    if "box" in entry and not (_are_numbers(box, 4) and box[0] < box[2] and box[1] < box[3]):
        yield f"has the box {_shown(box)}; a box is [left, top, right, bottom]"
    if "mask" in entry and not (isinstance(mask, str) and mask and "\0" not in mask):
        yield f"has the mask {_shown(mask)}; a mask is the path of a picture"
    if "mask" in entry and ("points" in entry or "box" in entry):
        yield "has a mask beside points or a box; a mask says all"
    name = entry.get("class", "x")
    if not (isinstance(name, str) and name.strip() and name.isprintable()):
        yield f"has the class {_shown(name)}; a class is a name"


def _way_out(entry: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Whether a mask, or a link that it is, lies elsewhere: such a file may come from anybody."""
    mask = entry.get("mask", "")
    try:
        is_inside = (folder / mask).resolve().is_relative_to(folder.resolve())
    except ValueError:  # half a surrogate pair is no text
        is_inside = False
    if not is_inside:
        yield f"has the mask {_shown(mask)}, which leads out of the folder of the prompts; copy it there"


def _are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of so many finite numbers."""
    return isinstance(values, list) and len(values) == count and all(
        type(value) in (int, float) and abs(value) < 1e9 for value in values
    )  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---------------------------------------------------------------- what only the pictures tell


def fitted(prompts: Sequence[Prompt], size: Size, count: int) -> tuple[list[Prompt], list[str]]:
    """(prompts with their masks, one for each object and frame, in the order of frames; what is wrong with others).

    Args:
        size: (height, width) of the picture.
        count: of frames, 0 where it is not known.
    """
    problems: list[str] = []
    found: dict[tuple[int, int], Prompt] = {}
    classes: dict[int, str] = {}
    for prompt in prompts:
        if count and prompt.frame >= count:
            frames = f"{count} frames, from 0 to {count - 1}" if count > 1 else "one frame, 0"
            problems.append(f"{prompt.where}: there is no frame {prompt.frame}: the input has {frames}")
        problems += [f"{prompt.where}: {problem}" for problem in _outside(prompt, size)]
        try:
            each = _with_masks(prompt, size) if prompt.mask_path else [prompt]
        except DataError as error:
            problems.append(f"{prompt.where}: the mask {error}")
            continue
        for one in each:
            assert one.object_id is not None
            name = f"object {one.object_id}"
            if (one.frame, one.object_id) in found:
                problems.append(f"{one.where}: {name} has prompts in frame {one.frame} already; join them in one entry")
            known = classes.setdefault(one.object_id, one.class_name) if one.class_name else ""
            if known != one.class_name:
                problems.append(f"{one.where}: {name} is of the class {one.class_name!r}, elsewhere of {known!r}")
            found[one.frame, one.object_id] = one
    return [replace(found[key], class_name=classes.get(key[1], "")) for key in sorted(found)], problems


def _outside(prompt: Prompt, size: Size) -> Iterator[str]:
    """Points and boxes that do not lie in the picture."""
    height, width = size
    for x, y in prompt.points:
        if not (0 <= x <= width and 0 <= y <= height):
            yield f"the point {x:g},{y:g} lies outside the picture, which is {width}x{height}"
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        if left < 0 or top < 0 or right > width or bottom > height:
            shown = ",".join(f"{value:g}" for value in prompt.box)
            yield f"the box {shown} reaches out of the picture, which is {width}x{height}"


def _with_masks(prompt: Prompt, size: Size) -> list[Prompt]:
    """One prompt for each object of a mask file; raises `DataError` for what is no mask of this picture."""
    path = prompt.mask_path
    if prompt.object_id is not None:
        masks = {prompt.object_id: read_alpha(path) > 127}
    else:
        labels = read_labels(path)
        values = np.unique(labels).tolist()
        inner = [value for value in values if 0 < value <= MAX_OBJECT]
        masks = {value: labels == value for value in inner} or {1: labels > 0}
    for mask in masks.values():
        if mask.shape != tuple(size):
            sides = f"{mask.shape[1]}x{mask.shape[0]}, its picture {size[1]}x{size[0]}"
            raise DataError(Fault(path, f"is {sides}"))
        if not mask.any():
            raise DataError(Fault(path, "is empty: it shows no object"))
    return [replace(prompt, object_id=number, mask=mask) for number, mask in masks.items()]
