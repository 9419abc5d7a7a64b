"""`load_all`: decode once, share the bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from errors import UserError
from layers import split_codes
from readers.base import Reader, Subset
from readers.checks import in_threads
from samples import Layers, Objects, Sample, Size
from transforms import resize

ABOUT = ("are_labels", "class_ids", "sample_id", "path", "dataset")  # fields of a sample beside its arrays
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # temporary folders are shared with other users


class Cached(Subset):
    """Another reader, decoded once into one memory-mapped file that workers and ranks share through the page cache.

    One process of each machine writes (`write=True`), all map the same `path`, and the writer then unlinks it, so
    nothing is left behind however the run ends. `barrier` waits for all of them, between writing and mapping and
    between mapping and unlinking. Alone, the defaults do. Forked workers inherit the mapping.

    With `size` samples are stored as `transforms.resize` makes them, with `pad` if so, what augmentation begins with
    anyway: the same bytes reach it, but an original size is no longer known, so evaluation, a dynamic size, samples
    that are combined and an `Augment` that takes originals cache without.

    Raises:
        UserError: no room for the file, by its path.
        DataError: a sample cannot be read.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        path: str | os.PathLike[str] | None = None,
        size: Size | None = None,
        pad: bool = False,
        write: bool = True,
        barrier: Callable[[], None] = lambda: None,
        workers: int = 4,
        progress: bool = True,
    ):
        super().__init__(reader, range(len(reader)))
        target = os.fspath(path or Path(tempfile.gettempdir(), f"cache-{os.getpid()}-{id(self)}"))
        if write:
            bar = tqdm(total=len(reader), desc="load all", disable=not progress, leave=False)
            _write_cache(reader, target, size, pad, workers, bar)
        barrier()
        self._bytes, self._index = _map_cache(target)
        barrier()
        if write:
            os.unlink(target)

    def read(self, index: int) -> Sample:
        """The sample on arrays that are copies: augmentation may write into them."""
        entry = self._index[index]
        arrays = [self._array(*place) for place in entry["arrays"]]
        frames = [arrays.pop(0) for _ in range(entry["frames"])]
        return Sample(frames=frames, masks=_joined(entry["kind"], arrays, frames[0].shape[:2]), **entry["about"])

    def _array(self, start: int, dtype: str, shape: list[int]) -> np.ndarray:
        length = np.dtype(dtype).itemsize * math.prod(shape)
        return self._bytes[start : start + length].copy().view(dtype).reshape(shape)


def _parts(masks: Any) -> tuple[str, list[np.ndarray]]:
    """The masks of a sample as (kind, arrays)."""
    if masks is None:
        return "none", []
    if isinstance(masks, Layers):
        return "layers", [masks.maps, masks.layer_of, masks.boxes]
    if isinstance(masks, Objects):
        counts = [code["counts"] for code in masks.codes]
        codes = np.frombuffer(b"".join(counts), np.uint8)
        return "objects", [codes, np.array(list(map(len, counts)), np.int64), masks.boxes, masks.crowd, masks.areas]
    return "array", [masks]


def _joined(kind: str, arrays: list[np.ndarray], size: Sequence[int]) -> Any:
    """What `_parts` took apart; codes are of this size."""
    if kind == "none":
        return None
    if kind == "layers":
        return Layers(*arrays)
    if kind == "objects":
        codes, lengths, *others = arrays
        return Objects(split_codes(codes.tobytes(), lengths, size), *others)
    return arrays[0]


def _write_cache(reader: Reader, path: str, size: Size | None, pad: bool, workers: int, bar: tqdm) -> None:
    """All arrays one after the other, then a JSON index of them, then 8 bytes with the index's length."""

    def load(index: int) -> Sample:
        sample = reader.read(index)
        return sample if size is None else resize(sample, size, pad=pad)

    index: list[dict[str, Any]] = []
    written = 0
    try:
        with bar, open(path, "wb", opener=lambda name, flags: os.open(name, flags | NO_LINKS, 0o600)) as file:
            for sample in in_threads(load, len(reader), workers):
                places = []
                kind, arrays = _parts(sample.masks)
                for array in [*sample.frames, *arrays]:
                    places.append((written, array.dtype.str, array.shape))
                    written += file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                about = {key: getattr(sample, key) for key in ABOUT}
                index.append({"arrays": places, "frames": len(sample.frames), "kind": kind, "about": about})
                bar.update()
            encoded = json.dumps(index).encode()
            file.write(encoded + len(encoded).to_bytes(8, "little"))
    except BaseException as error:
        Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"data.load_all: no room for the cache {path} after {written / 2**20:.0f} MiB; "
                "point TMPDIR at a larger disk or set data.load_all: false"
            ) from error
        raise


def _map_cache(path: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(mapped[-8:].tobytes(), "little")
    return mapped, json.loads(mapped[-8 - length : -8].tobytes())
