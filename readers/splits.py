"""Parts of a reader: folds, a fraction held out, a limited number."""

from __future__ import annotations

import hashlib

from errors import UserError
from readers.base import Reader, Subset


def split(
    reader: Reader, *, part: str, fold: str | None = None, fraction: float | None = None, seed: int = 0
) -> Reader:
    """The "train" or "val" part of a reader: fold `k/n` of a cross-validation, or a fraction held out.

    Each dataset is split on its own, in the order of a hash of (seed, sample id): other datasets do not matter, and a
    file more or less moves few samples to the other part of a fraction split.

    Raises:
        UserError: a fold that is no `k/n` with 0 <= k < n and n >= 2, a fraction outside (0, 1), or an empty part.
    """
    if (fold is None) == (fraction is None):
        raise UserError("data: give either data.fold or a fraction for the validation split")
    held_out: set[int] = set()
    for indices in reader.by_dataset().values():
        ordered = sorted(indices, key=lambda i: hashlib.sha256(f"{seed}:{reader.sample_id(i)}".encode()).digest())
        held_out.update(ordered[_fold_slice(fold) if fold is not None else _fraction_slice(fraction, len(ordered))])
    kept = [index for index in range(len(reader)) if (index in held_out) == (part == "val")]
    if not kept:
        raise UserError(f"data: the split leaves no samples for the {part} part of {len(reader)}")
    return Subset(reader, kept)


def _fold_slice(fold: str) -> slice:
    number, _, count = fold.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) and int(count) >= 2):
        raise UserError(f"data.fold: {fold!r} must be k/n with k from 0 to n-1, for example 0/5")
    return slice(int(number), None, int(count))


def _fraction_slice(fraction: float | None, count: int) -> slice:
    if not (fraction and 0 < fraction < 1):
        raise UserError(f"data: a validation fraction of {fraction} must lie between 0 and 1")
    return slice(min(max(1, round(count * fraction)), count - 1))


def limit(reader: Reader, max_samples: int | None) -> Reader:
    """At most `max_samples`, evenly spaced through the reader, so each dataset keeps its share."""
    if max_samples is None or max_samples >= len(reader):
        return reader
    if max_samples < 1:
        raise UserError(f"data.max_samples: {max_samples} must be at least 1")
    return Subset(reader, [i * len(reader) // max_samples for i in range(max_samples)])
