"""Curves, stacked shares and a histogram as inline SVG, for report.py.

Colours and type are those of the page's style sheet; what the pointer shows stands in `data-chart` and is read by the
page's script (both in report_template.html). Whatever is drawn, a chart stays small: a curve has at most `POINTS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

POINTS = 240  # of a curve
WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 352, 8, 158  # edges of the plot
DOTS = 60  # a curve of more points has no dots


@dataclass(frozen=True)
class Curve:
    """(n,) steps and, around each, the mean, the least and the greatest value; NaN where none is finite.

    `color` is a class of the style sheet: train, val, or s0 to s7.
    """

    name: str
    color: str
    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


@dataclass(frozen=True)
class Marks:
    """What all charts of a run share: the last step, and the steps at which it was resumed or skipped a step."""

    last_step: int
    resumed: Sequence[int] = ()
    skipped: Sequence[int] = ()


@dataclass(frozen=True)
class Scale:
    """From values to places along an axis; `ticks` are values."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def thin(name: str, color: str, steps: np.ndarray, values: np.ndarray) -> Curve:
    """A curve of at most `POINTS` points from (n,) steps and values, n > 0. Extremes stay, as `lows` and `highs`."""
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    finite = [values[part][np.isfinite(values[part])] for part in parts]
    means, lows, highs = (
        np.array([reduce(part) if part.size else math.nan for part in finite]) for reduce in (np.mean, np.min, np.max)
    )
    return Curve(name, color, np.array([steps[part].mean() for part in parts]), means, lows, highs)


# ---------------------------------------------------------------- charts


def line_chart(
    title: str,
    curves: Sequence[Curve],
    marks: Marks,
    *,
    log: bool = False,
    level: float | None = None,
    best: tuple[int, float] | None = None,
) -> str:
    """Curves over steps, the last of them in front.

    `log`: a logarithmic axis where all values are positive and span two decades. `level` is the base model's value,
    `best` (step, value) of the best validation.
    """
    drawn = [value for curve in curves for value in (*curve.means, *_usual(curve))]
    drawn += [level] if level is not None else []
    drawn += [best[1]] if best is not None else []
    y = value_scale(np.array(drawn), log)
    x = step_scale(marks)
    parts = [_curve(curve, x, y) for curve in curves]
    keys = [_key(curve.color, curve.name, _last(curve.means)) for curve in curves]
    if level is not None:
        parts.insert(0, f'<path class="level" d="M{LEFT} {y(level):.1f}H{RIGHT}"/>')
        keys.append(_key("level", "base model", number(level)))
    if best is not None:
        step, value = best
        parts.append(f'<circle class="best" cx="{x(step):.1f}" cy="{y(value):.1f}" r="5"/>')
        keys.append(_key("best", "best", number(value)))
    data = {"to": x.high, "curves": [_data(curve.steps, curve.means) for curve in curves]}
    labels = [number_short(tick) for tick in y.ticks]
    return _figure(title, keys, _frame(x, y, labels) + _marks(marks, x), "".join(parts), data)


def share_chart(title: str, curves: Sequence[Curve], marks: Marks) -> str:
    """Shares of a whole, each in 0..1, stacked."""
    x, y = step_scale(marks), Scale(0, 1, BOTTOM, TOP, ticks=[0, 0.25, 0.5, 0.75, 1])
    below = np.zeros(len(curves[0].steps))
    parts = []
    for curve in curves:
        above = below + np.nan_to_num(curve.means)
        parts.append(f'<path class="area {curve.color}" d="{_band(curve.steps, below, above, x, y)}"/>')
        below = above
    keys = [_key(f"{curve.color} block", curve.name, _last(curve.means, "%")) for curve in curves]
    data = {"to": x.high, "unit": "%", "curves": [_data(curve.steps, curve.means) for curve in curves]}
    labels = [f"{tick:.0%}" for tick in y.ticks]
    return _figure(title, keys, _frame(x, y, labels) + _marks(marks, x), "".join(parts), data)


def histogram(title: str, note: str, values: np.ndarray) -> str:
    """How many of (n,) finite values lie where, n > 0; over 0..1 where all of them do."""
    is_share = values.min() >= 0 and values.max() <= 1
    counts, edges = np.histogram(values, 20, range=(0, 1) if is_share else None)
    x = Scale(edges[0], edges[-1], LEFT, RIGHT, ticks=nice_ticks(edges[0], edges[-1]))
    y = Scale(0, counts.max(), BOTTOM, TOP, ticks=sorted({round(tick) for tick in nice_ticks(0, counts.max())}))
    bars = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        words = f"{number_short(left)} to {number_short(right)}: {count} sample{'' if count == 1 else 's'}"
        bars.append(
            f'<rect class="bar" x="{x(left) + 0.5:.1f}" y="{y(count):.1f}" width="{x(right) - x(left) - 1:.1f}" '
            f'height="{BOTTOM - y(count):.1f}"><title>{words}</title></rect>'
        )
    frame = _frame(x, y, [str(tick) for tick in y.ticks])
    return _figure(title, [f"<li>{escape(note)}</li>"], frame, "".join(bars), None)


# ---------------------------------------------------------------- scales and numbers


def step_scale(marks: Marks) -> Scale:
    """The horizontal axis, the same for all charts of a run."""
    last = max(1, marks.last_step)
    return Scale(0, last, LEFT, RIGHT, ticks=[tick for tick in nice_ticks(0, last) if tick == round(tick)])


def value_scale(values: np.ndarray, log: bool) -> Scale:
    """The vertical axis of (n,) values, of which none need be finite."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if log and low > 0 and high / low > 100:
        low, high = low / 1.3, high * 1.3
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return Scale(low, high, BOTTOM, TOP, True, [10.0**power for power in powers[:: 1 + len(powers) // 6]])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    bottom = 0.0 if low >= 0 > low - margin else low - margin
    return Scale(bottom, high + margin, BOTTOM, TOP, ticks=nice_ticks(bottom, high + margin))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count` + 1 multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Four digits, as the page's script writes them too."""
    return f"{value:#.4g}" if math.isfinite(value) else "–"


def number_short(value: float) -> str:
    """As an axis has room for: 0.25, 1e-4, 20k."""
    if abs(value) >= 1e4:
        unit, factor = ("M", 1e6) if abs(value) >= 1e6 else ("k", 1e3)
        return f"{value / factor:.6g}{unit}"
    text = f"{value:.6g}"
    return text if abs(value) >= 0.001 or not value else f"{value:.3g}".replace("e-0", "e-")


# ---------------------------------------------------------------- pieces


def _figure(title: str, keys: list[str], frame: str, content: str, data: dict | None) -> str:
    x, width = LEFT - 6, RIGHT - LEFT + 12  # what a band has beyond the axes is cut off, a dot on the edge is not
    live = f' tabindex="0" data-chart="{escape(json.dumps(data))}"' if data else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="at"></span></figcaption>'
        f'<ul class="legend">{"".join(keys)}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{live}>{frame}'
        f'<svg x="{x}" y="0" width="{width}" height="{BOTTOM + 2}" viewBox="{x} 0 {width} {BOTTOM + 2}">{content}</svg>'
        f'<line class="cross" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/></svg></figure>\n'
    )


def _frame(x: Scale, y: Scale, labels: list[str]) -> str:
    """Grid lines and the labels of both axes."""
    rows = [
        f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>'
        for tick, label in zip(y.ticks, labels, strict=True)
    ]
    columns = [
        f'<text x="{min(x(tick), RIGHT - 8):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{number_short(tick)}</text>'
        for tick in x.ticks
    ]
    return "".join(rows + columns)


def _curve(curve: Curve, x: Scale, y: Scale) -> str:
    """The mean as a line, what lies between least and greatest as a band behind it, and few points as dots."""
    shown = np.isfinite(curve.means) & ((curve.lows > 0) | (not y.is_log))
    parts = []
    if np.any(curve.highs[shown] > curve.lows[shown]):
        runs = [run for run in _runs(shown) if len(run) > 1]
        band = "".join(_band(curve.steps[run], curve.lows[run], curve.highs[run], x, y) for run in runs)
        parts.append(f'<path class="band {curve.color}" d="{band}"/>')
    line = "".join("M" + _places(curve.steps[run], curve.means[run], x, y) for run in _runs(shown))
    parts.append(f'<path class="line {curve.color}" d="{line}"/>')
    if shown.sum() <= DOTS:
        parts += [
            f'<circle class="dot {curve.color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2">'
            f"<title>step {step:.0f}: {escape(curve.name)} {number(value)}</title></circle>"
            for step, value in zip(curve.steps[shown], curve.means[shown], strict=True)
        ]
    return "".join(parts)


def _usual(curve: Curve) -> list[float]:
    """The range of the band without its rarest peaks: one of them would press everything else into a line."""
    lows, highs = (values[np.isfinite(values)] for values in (curve.lows, curve.highs))
    return [float(np.percentile(lows, 2)), float(np.percentile(highs, 98))] if lows.size else []


def _runs(shown: np.ndarray) -> list[np.ndarray]:
    """The indices of each unbroken stretch of (n,) bool."""
    indices = np.flatnonzero(shown)
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else []


def _band(steps: np.ndarray, lows: np.ndarray, highs: np.ndarray, x: Scale, y: Scale) -> str:
    return f"M{_places(steps, highs, x, y)}L{_places(steps[::-1], lows[::-1], x, y)}Z"


def _places(steps: np.ndarray, values: np.ndarray, x: Scale, y: Scale) -> str:
    return "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, values, strict=True))


def _marks(marks: Marks, x: Scale) -> str:
    """A line where the run was resumed, a tick where a step was skipped; those that fall on one place are one."""

    def path(steps: Sequence[int], top: int, bottom: int) -> str:
        return "".join(f"M{place:.1f} {top}V{bottom}" for place in sorted({round(x(step), 1) for step in steps}))

    drawn = {"resumed": path(marks.resumed, TOP, BOTTOM), "skipped": path(marks.skipped, BOTTOM + 1, BOTTOM + 6)}
    return "".join(f'<path class="{name}" d="{places}"/>' for name, places in drawn.items() if places)


def _key(color: str, name: str, value: str) -> str:
    return f'<li><i class="key {color}"></i>{escape(name)} <output>{value}</output></li>'


def _last(values: np.ndarray, unit: str = "") -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "–"
    return f"{finite[-1]:.1%}" if unit == "%" else number(finite[-1])


def _data(steps: np.ndarray, values: np.ndarray) -> list[list]:
    """[steps, values] with what the pointer shows, in few digits."""
    plain = [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
    return [[round(step) for step in steps.tolist()], plain]
