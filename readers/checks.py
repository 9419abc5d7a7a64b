"""The data check: everything is decoded once, and everything wrong is listed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from errors import UserError
from readers.base import Fault, Reader, Subset

T = TypeVar("T")


def check(reader: Reader, *, workers: int = 4, progress: bool = True) -> list[Fault]:
    """Decode everything once and return every fault, those seen while listing first."""
    per_sample = in_threads(reader.find_faults, len(reader), workers)
    bar = tqdm(per_sample, desc="check data", total=len(reader), disable=not progress, leave=False)
    return [*reader.faults, *(fault for faults in bar for fault in faults)]


def in_threads(work: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """`work(0)` to `work(count - 1)` in order, never far ahead: neither results nor, on an interrupt, work pile up."""
    workers = max(1, workers)
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, count, 8 * workers):
            yield from pool.map(work, range(first, min(first + 8 * workers, count)))


def fail_on(faults: Sequence[Fault], way_out: str = "mend them or set data.on_error: skip") -> None:
    """Raise one `UserError` that lists the faults (the first 50 of them), if there are any."""
    if not faults:
        return
    lines = [f"  {fault}" for fault in faults[:50]]
    if len(faults) > 50:
        lines.append(f"  … and {len(faults) - 50} more")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise UserError("\n".join([f"{count} in the data; {way_out}", *lines]))


def drop(reader: Reader, faults: Sequence[Fault]) -> tuple[Reader, int]:
    """The reader without its faulty samples, and how many files the faults concern.

    Raises:
        UserError: nothing is left.
    """
    faulty = {fault.path for fault in faults}
    kept = [index for index in range(len(reader)) if faulty.isdisjoint(reader.files(index))]
    if not kept:
        fail_on(faults or [Fault("data", "holds no samples")])
    return Subset(reader, kept, faults=()), len(faulty)
