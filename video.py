"""The frames of a video file, decoded one at a time, forwards or backwards."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator

import cv2
import numpy as np

from readers import DataError, Fault
from readers.films import check_length, count_of, open_film, rate_of

CHUNK_FRAMES, CHUNK_BYTES = 64, 2**27  # that are decoded together to be read backwards


class VideoReader:
    """The frames of a video, upright by its rotation, (H, W, 3) uint8 RGB. To be iterated over once.

    Attributes:
        rate: frames a second, the mean where it varies.
        count: how many frames the file announces, 0 where it does not.

    Raises:
        DataError: it cannot be opened; or, at the end of the iteration, it held less than it announced.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._capture = open_film(self.path)
        self.rate, self.count = rate_of(self._capture), count_of(self._capture)

    def seek(self, number: int) -> VideoReader:
        """Go on with this frame, or with one near it: that is up to the container."""
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        return self

    def __iter__(self) -> Iterator[np.ndarray]:
        seconds = 0.0
        while True:
            is_read, frame = self._capture.read()
            if not is_read:
                break
            seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 + 1 / self.rate
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        check_length(self.path, seconds, self._capture)
        self._capture.release()


class Backwards:
    """The frames of a video before the one numbered `stop`, the last one first, a few of them in memory.

    They are decoded again, and containers are not to be trusted with a place in time: a seek often ends some frames
    off. So a pass from the start notes a checksum of each frame, and where a seek does not lead to these very frames,
    they are decoded from the start on once more.

    Raises:
        DataError: in the iteration, for a file that does not give the same frames twice, or has fewer.
    """

    def __init__(self, path: str | os.PathLike[str], stop: int):
        self.path, self.stop, self.can_seek = os.fspath(path), stop, True

    def __iter__(self) -> Iterator[np.ndarray]:
        self._sums = [checksum(frame) for frame in itertools.islice(VideoReader(self.path), self.stop)]
        stop, length = self.stop, 1  # of a chunk, until the size of a frame is known
        while stop:
            start = max(0, stop - length)
            frames = self._frames(start, stop)
            length = int(np.clip(CHUNK_BYTES // frames[0].nbytes, 1, CHUNK_FRAMES))
            while frames:
                yield frames.pop()
            stop = start

    def _frames(self, start: int, stop: int) -> list[np.ndarray]:
        if self.can_seek:
            try:
                frames = list(itertools.islice(VideoReader(self.path).seek(start), stop - start))
            except DataError:  # it led to the end
                frames = []
            if self._are(frames, start, stop):
                return frames
            self.can_seek = False
        frames = list(itertools.islice(VideoReader(self.path), start, stop))
        if not self._are(frames, start, stop):
            raise DataError(Fault(self.path, "does not give the same frames twice; has it just been changed?"))
        return frames

    def _are(self, frames: list[np.ndarray], start: int, stop: int) -> bool:
        return len(frames) == stop - start and [checksum(frame) for frame in frames] == self._sums[start:stop]


def checksum(frame: np.ndarray) -> int:
    """Of a frame, to tell it from others."""
    return zlib.crc32(frame.data)
