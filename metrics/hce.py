"""Human correction effort (Qin et al., ECCV 2022): the clicks that would correct a binary mask."""

from __future__ import annotations

import cv2
import numpy as np

from metrics.pair import Pair
from metrics.saliency import grown
from metrics.skeleton import skeleton

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
RELAX = 5  # errors that are thinner than this many erosions and dilations need no click
EPSILON = 2.0  # pixels that the polygon through the clicks may be off


def human_correction_effort(pair: Pair, found: np.ndarray, whole_image: int = 1) -> int:
    """Polygon points plus separate regions of what `found`, (H, W) uint8 of 0 and 1, has too much and too little.

    `whole_image` is what an error counts that is the whole image: 1 in PySODMetrics; 0 in BiRefNet's evaluation, where
    its label is taken for the background's.
    """
    box = grown(cv2.boundingRect(found | pair.truth), 1, found.shape)
    found, there = found[box], pair.truth[box]
    hit, false, missed = found & there, found & (1 - there), there & (1 - found)
    core: np.ndarray = cv2.erode(found | there, CROSS, iterations=RELAX)

    false = false & regrown(false & core, within=1 - there)
    relaxed = missed & regrown(missed & core, within=1 - found)
    # However thin, what is missed of the truth's skeleton is structure.
    missed = relaxed | skeleton(there, where=cv2.subtract(missed, relaxed))

    effort = 0
    for error, neighbours in ((false, hit | missed), (missed, 1 - (hit | false | missed))):
        area = cv2.countNonZero(error)
        if area == pair.size:
            effort += whole_image
        elif area:
            effort += clicks(error, cv2.dilate(neighbours, CROSS))
    return effort


def regrown(seeds: np.ndarray, *, within: np.ndarray) -> np.ndarray:
    """`seeds` dilated `RELAX` times, each time cut to `within`."""
    if cv2.countNonZero(seeds):
        for _ in range(RELAX):
            seeds = np.bitwise_and(cv2.dilate(seeds, CROSS), within)
    return seeds


# ---------------------------------------------------------------- clicks along contours


def clicks(error: np.ndarray, border: np.ndarray) -> int:
    """Polygon points along those parts of the contours of `error` that lie on `border`, plus regions without any.

    A pixel that several contours pass belongs to the first of them.
    """
    contours, _ = cv2.findContours(error, cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    points = np.concatenate(contours)
    places = points[:, 0, 1].astype(np.intp) * error.shape[1] + points[:, 0, 0]
    order = np.arange(len(places))
    first = np.empty(error.size, np.intp)
    first[places[::-1]] = order[::-1]  # where a place is written twice, the last stays
    kept = np.flatnonzero((border.ravel()[places] != 0) & (first[places] == order))

    count, labels = cv2.connectedComponents(error)
    touched = np.zeros(count, bool)
    touched[labels.ravel()[places[kept]]] = True
    separate = count - 1 - int(np.count_nonzero(touched))
    if not kept.size:
        return separate
    return separate + polygon_points(points, kept, np.repeat(order[: len(contours)], [len(line) for line in contours]))


def polygon_points(points: np.ndarray, kept: np.ndarray, contour: np.ndarray) -> int:
    """Points that `cv2.approxPolyDP` leaves of the runs of `kept` points; `contour` numbers the contour of each point.

    Where the first and the last run of a contour meet, the first follows the last *reversed*, as in the official code.
    """
    breaks = np.flatnonzero((np.diff(kept) != 1) | (np.diff(contour[kept]) != 0)) + 1
    starts, ends = kept[np.r_[0, breaks]], kept[np.r_[breaks, len(kept)] - 1] + 1
    firsts = np.flatnonzero(np.diff(contour[starts], prepend=-1))
    lasts = np.r_[firsts[1:], len(starts)] - 1
    gaps = np.abs(points[starts[firsts], 0] - points[ends[lasts] - 1, 0]).max(1)
    meet = (firsts != lasts) & (gaps == 1)

    alone = np.ones(len(starts), bool)
    alone[firsts[meet]] = alone[lasts[meet]] = False
    lengths = ends - starts
    short = lengths <= 4  # all of up to four neighbouring pixels are within EPSILON of the ends of their run
    total = int(np.minimum(lengths[alone & short], 2).sum())
    lines = [points[starts[run] : ends[run]] for run in np.flatnonzero(alone & ~short)]
    for first, last in zip(firsts[meet], lasts[meet], strict=True):
        lines.append(np.concatenate([points[starts[last] : ends[last]], points[starts[first] : ends[first]][::-1]]))
    return total + sum(len(cv2.approxPolyDP(line, EPSILON, False)) for line in lines)
