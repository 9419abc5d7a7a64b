"""Zhang and Suen's thinning (CACM 1984) on 64 pixels at a time, with the result of scikit-image's `skeletonize`."""

from __future__ import annotations

import numpy as np

# A neighbourhood is a number whose bits are the eight neighbours, clockwise from the top left.
Diagram = list[tuple[int, int, int]]


def removable_table() -> np.ndarray:
    """(256,) uint8: 1 for neighbourhoods whose centre is removed in first turns, 2 in second turns, 3 in both.

    The conditions are Zhang and Suen's, except in the neighbourhoods where scikit-image decides otherwise.
    """
    table = np.zeros(256, np.uint8)
    for code in range(256):
        ring = [code >> bit & 1 for bit in range(8)]
        _, north, _, east, _, south, _, west = ring
        crossings = sum(ring[bit - 1] < ring[bit] for bit in range(8))
        if crossings == 1 and 2 <= sum(ring) <= 6:
            table[code] = 1 * (not (north & east & south or east & south & west))
            table[code] += 2 * (not (north & east & west or north & south & west))
    table[[48, 129]] = 0
    table[[3, 6, 11, 12, 14, 131, 134, 161, 194, 198]] = 1
    table[[24, 26, 56, 96, 104, 108, 176, 192, 224]] = 2
    table[[10, 40, 130, 160]] = 3
    return table


def unsettled_table(removable: np.ndarray) -> np.ndarray:
    """(256,) bool: neighbourhoods whose centre could be removed now, or once some more of its neighbours are."""
    table = removable > 0
    for code in range(256):
        table[code] |= any(table[code & ~(1 << bit)] for bit in range(8))
    return table


def diagram(table: np.ndarray, order: tuple[int, ...]) -> Diagram:
    """The decision diagram of 256 truth values: steps (bit, if it is 0, if it is 1), each a number of an earlier step.

    Steps count from 2; 0 and 1 are false and true. The last step is the answer. The bits are asked in this `order`,
    which was chosen for few steps.
    """
    steps: Diagram = []
    numbers: dict[tuple[bool, ...], int] = {}

    def number(values: tuple[bool, ...], bits: tuple[int, ...]) -> int:
        if len(set(values)) == 1:
            return int(values[0])
        if values not in numbers:
            low, high = number(values[0::2], bits[1:]), number(values[1::2], bits[1:])
            if low != high:
                steps.append((bits[0], low, high))
            numbers[values] = low if low == high else len(steps) + 1
        return numbers[values]

    codes = [sum((place >> rank & 1) << bit for rank, bit in enumerate(order)) for place in range(256)]
    number(tuple(table[codes].tolist()), order)
    return steps


REMOVABLE = removable_table()
TURNS = (
    diagram(REMOVABLE & 1 > 0, (2, 3, 5, 6, 0, 7, 1, 4)),
    diagram(REMOVABLE & 2 > 0, (1, 2, 7, 6, 4, 3, 5, 0)),
)
UNSETTLED = diagram(unsettled_table(REMOVABLE), (0, 1, 2, 3, 4, 5, 6, 7))
ROUNDS = 4  # of two turns, between looks at what may change yet
FOLLOWED = 8  # pixels


def skeleton(mask: np.ndarray, *, where: np.ndarray) -> np.ndarray:
    """The skeleton of `mask` within `where`, all (H, W) uint8 of 0 and 1.

    It ends once nothing in `where` can change any more, which is long before the core of a thick shape is thin.
    """
    alive, asked = packed(mask), packed(where)
    words = mask.shape[1] // 64 + 1
    inner = slice(words, -words)
    while may_change(alive, asked, words):
        for turn in TURNS * ROUNDS:
            alive[inner] &= ~evaluate(turn, neighbours(alive, words))
    rows = alive[inner].view(np.uint8).reshape(len(mask), -1)
    return np.unpackbits(rows, axis=1, count=mask.shape[1], bitorder="little") & where


def may_change(alive: np.ndarray, asked: np.ndarray, words: int) -> bool:
    """Whether a pixel of `asked` may still be removed.

    Removals spread from pixels that are removable now through such as may become so. From `asked` these are followed
    backwards for a few pixels; where that leads further, the answer is yes.
    """
    inner = slice(words, -words)
    around = neighbours(alive, words)
    now = (evaluate(TURNS[0], around) | evaluate(TURNS[1], around)) & alive[inner]
    later = evaluate(UNSETTLED, around) & alive[inner]
    reached = np.zeros_like(alive)
    reached[inner] = asked[inner] & later
    for _ in range(FOLLOWED):
        before = reached.copy()
        reached[inner] |= np.bitwise_or.reduce(neighbours(before, words)) & later
        if (reached[inner] & now).any():
            return True
        if np.array_equal(reached, before):
            return False
    return bool(now.any())


def packed(mask: np.ndarray) -> np.ndarray:
    """Rows of 64-bit words, flat, with a black row above and below and a black bit or more at the end of each."""
    height, width = mask.shape
    rows = np.zeros((height + 2, (width // 64 + 1) * 8), np.uint8)
    rows[1:-1, : (width + 7) // 8] = np.packbits(mask, axis=1, bitorder="little")
    return rows.view("<u8").ravel()


def neighbours(alive: np.ndarray, words: int) -> list[np.ndarray]:
    """For each direction, clockwise from the top left, the neighbours of all pixels but those of the outer rows."""
    west, east = alive << np.uint64(1), alive >> np.uint64(1)
    west[1:] |= alive[:-1] >> np.uint64(63)
    east[:-1] |= alive[1:] << np.uint64(63)
    up, here, down = slice(None, -2 * words), slice(words, -words), slice(2 * words, None)
    return [west[up], alive[up], east[up], east[here], east[down], alive[down], west[down], west[here]]


def evaluate(steps: Diagram, planes: list[np.ndarray]) -> np.ndarray:
    """The answer for each pixel, given bit planes of its neighbours."""
    results = [np.zeros_like(planes[0]), np.full_like(planes[0], np.iinfo(np.uint64).max)]
    for bit, low, high in steps:
        plane, if_0, if_1 = planes[bit], results[low], results[high]
        if low == 0:
            results.append(plane & if_1)
        elif high == 1:
            results.append(plane | if_0)
        else:
            chosen = if_0 ^ if_1
            chosen &= plane
            chosen ^= if_0
            results.append(chosen)
    return results[-1]
