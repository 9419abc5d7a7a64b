"""How many times faster than PySODMetrics the field's scores are, on one thread and in the same run.

    pip install pysodmetrics && python benchmarks/binary_metrics.py --size 1024

Each figure is the median over paired runs on masks of several kinds: one thick object, many small ones, thin lines,
and a soft matte. PySODMetrics is needed for the comparison alone; without it the seconds of this program are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics.scores import SCORES, field_scores

try:
    import py_sod_metrics
except ImportError:
    py_sod_metrics = None

USUAL = ["s_measure", "weighted_f", "max_f", "mean_f", "adaptive_f", "max_e", "mean_e", "adaptive_e", "normalized_mae"]
MSIOU = ["adaptive_msiou", "binary_msiou"]


def main() -> None:
    options = parse_options()
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore")
    if py_sod_metrics is None:
        print("PySODMetrics is not installed (pip install pysodmetrics): only the seconds of this program follow")
    print(f"{options.size}² pixels, one thread, median of {options.repeats} paired runs: milliseconds and ratio")
    for title, names, reference in (
        ("S, weighted F, E, F, MAE", USUAL, ["Smeasure", "WeightedFmeasure", "Emeasure", "Fmeasure", "MAE"]),
        ("  and MSIoU", [*USUAL, *MSIOU], ["Smeasure", "WeightedFmeasure", "Emeasure", "Fmeasure", "MAE", "MSIoU"]),
        ("HCE", ["hce"], ["HumanCorrectionEffortMeasure"]),
    ):
        for kind, (prediction, truth) in pairs(options.size).items():
            compare(f"{title}, {kind}", options.repeats, *works(prediction, truth, names, reference))
    for kind, (prediction, truth) in pairs(options.size).items():
        compare(f"every score there is, {kind}", options.repeats, *works(prediction, truth, list(SCORES), []))


def works(
    prediction: np.ndarray, truth: np.ndarray, names: list[str], reference: list[str]
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """What to time: ours, and PySODMetrics' where it is installed and has these."""

    def theirs() -> None:
        for name in reference:
            arguments: dict[str, bool] = {}
            if name == "MSIoU":
                arguments = {"with_dynamic": False, "with_adaptive": True, "with_binary": True}
            getattr(py_sod_metrics, name)(**arguments).step(prediction, truth)

    return lambda: field_scores(prediction, truth, names), theirs if py_sod_metrics and reference else None


def compare(title: str, repeats: int, ours: Callable[[], Any], theirs: Callable[[], Any] | None) -> None:
    """Time both in turn and print medians, of the ratio too."""
    ours()
    times = [(seconds(ours), seconds(theirs) if theirs else 0.0) for _ in range(repeats)]
    line = f"{title:<45} {statistics.median(a for a, _ in times) * 1e3:7.1f} ms"
    if theirs:
        line += f"  against {statistics.median(b for _, b in times) * 1e3:7.1f} ms: "
        line += f"{statistics.median(b / a for a, b in times):5.1f} x"
    print(line, flush=True)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---------------------------------------------------------------- masks


def pairs(side: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(prediction, truth), (side, side) uint8 each, by kind."""
    blob, noise = field(7, side, seed=0), field(40, side, seed=1) - 0.5
    spots = field(60, side, seed=2)
    lines = thin_lines(side)
    shifted = cv2.GaussianBlur(np.roll(lines, (1, 2), (0, 1)), (5, 5), 1)
    shifted[side // 3 : side // 2, side // 4 : side // 2] = 0
    return {
        "thick object": (soft(blob + 0.05 * noise, 0.5, 0.01), hard(blob, 0.5)),
        "many objects": (soft(spots + 0.15 * (field(90, side, seed=3) - 0.5), 0.55, 0.02), hard(spots, 0.5)),
        "thin lines": (shifted, lines),
        "soft matte": (soft(blob + 0.1 * noise, 0.55, 0.05), soft(blob, 0.55, 0.05)),
    }


def field(cells: int, side: int, seed: int) -> np.ndarray:
    """A smooth random map, about 0 to 1."""
    coarse = np.random.default_rng(seed).random((cells, cells), dtype=np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def hard(values: np.ndarray, limit: float) -> np.ndarray:
    return ((values > limit) * 255).astype(np.uint8)


def soft(values: np.ndarray, limit: float, width: float) -> np.ndarray:
    return (255 / (1 + np.exp((limit - values) / width))).astype(np.uint8)


def thin_lines(side: int) -> np.ndarray:
    generator = np.random.default_rng(4)
    canvas = np.zeros((side, side), np.uint8)
    for _ in range(40):
        points = generator.integers(0, side, (4, 1, 2), dtype=np.int32)
        cv2.polylines(canvas, [points], False, 255, int(generator.integers(2, 7)), cv2.LINE_AA)
    return canvas


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="side of the square masks")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
