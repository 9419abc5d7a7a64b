"""How many times faster J and F of clips are than in SA-V's own evaluation, on one thread and in the same run.

    python benchmarks/video_metric.py --official path/to/sam2

The clips are drawn: objects of several sizes that move, and predictions that are a little off. Each figure is the
median over paired runs, in CPU seconds, of a frame with all its objects, whose label maps are in memory on both sides.
Both give the same scores, or the benchmark fails. `--official` is a clone of facebookresearch/sam2, whose
sav_dataset/utils/sav_benchmark.py needs scikit-image; without it only ours runs.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics.video import score_clip

Scores = list[float]
CASES = [(480, 854, 1), (480, 854, 5), (1080, 1920, 1), (1080, 1920, 5)]  # height, width, objects


class Drawn:
    """Masklets whose label maps are in memory."""

    def __init__(self, labels: np.ndarray, count: int):
        self.labels = labels
        self.object_ids: Sequence[int] = range(1, count + 1)
        self.annotated: Sequence[bool] = [True] * len(labels)

    def visible(self, frame: int) -> list[int]:
        return [number - 1 for number in np.flatnonzero(np.bincount(self.labels[frame].ravel())).tolist() if number]

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        return self.labels[frame] == np.array([place + 1 for place in objects], np.uint8)[:, None, None]


def main() -> None:
    options = parse_options()
    cv2.setNumThreads(1)
    place = Path(options.official or "") / "sav_dataset" / "utils" / "sav_benchmark.py"
    evaluator = runpy.run_path(str(place))["Evaluator"] if options.official else None
    print(f"CPU milliseconds of a frame, median of {options.repeats} paired runs of {options.frames} frames")
    for height, width, count in CASES:
        there, found = (draw(height, width, count, options.frames, shift) for shift in (0, 3))
        works: dict[str, Callable[[], Scores]] = {"ours": partial(ours, found, there, count)}
        if evaluator:
            works["official"] = partial(theirs, evaluator, found, there)
        compare(f"{width}x{height}, {count} objects", works, options)


def compare(title: str, works: dict[str, Callable[[], Scores]], options: argparse.Namespace) -> None:
    """Time all in turn and print medians, of the ratio too."""
    results = {name: work() for name, work in works.items()}
    if "official" in results:
        np.testing.assert_allclose(results["ours"], results["official"], rtol=0, atol=1e-12)
    runs = [{name: seconds(work) / options.frames for name, work in works.items()} for _ in range(options.repeats)]
    line = f"{title:<22} " + ", ".join(
        f"{name} {1e3 * statistics.median(run[name] for run in runs):6.2f}" for name in works
    )
    if "official" in works:
        line += f": {statistics.median(run['official'] / run['ours'] for run in runs):.1f} x"
    print(line, flush=True)


def ours(found: np.ndarray, there: np.ndarray, count: int) -> Scores:
    scores = score_clip(found.__getitem__, Drawn(there, count), skip_ends=False)
    return [*scores["j"], *scores["f"]]


def theirs(make_evaluator: Callable[[], Any], found: np.ndarray, there: np.ndarray) -> Scores:
    official = make_evaluator()
    for each in zip(found, there, strict=True):
        official.feed_frame(*each)
    regions, contours = official.conclude()
    return [values[number] / 100 for values in (regions, contours) for number in sorted(values)]


def draw(height: int, width: int, count: int, frames: int, shift: int) -> np.ndarray:
    """(frames, height, width) uint8 labels of wavy blobs of several sizes, `shift` pixels off their places."""
    labels = np.zeros((frames, height, width), np.uint8)
    angles = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    for number in range(1, count + 1):
        generator = np.random.default_rng(number)
        center, phase = generator.uniform(0.25, 0.75, 2) * (width, height), generator.uniform(0, 6, 2)
        radius = height * generator.uniform(0.08, 0.3) + shift / 2
        radii = radius * (1 + 0.2 * np.sin(3 * angles + phase[0]) + 0.08 * np.sin(11 * angles + phase[1]))
        outline = center + shift + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        for t in range(frames):
            moved = outline + np.array([5 * t, 2 * t])
            cv2.fillPoly(labels[t], [moved.astype(np.int32)], number)
    return labels


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--official", help="a clone of facebookresearch/sam2")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--repeats", type=int, default=7, help="paired runs of each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
