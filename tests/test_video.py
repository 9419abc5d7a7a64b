"""Videos as files, in and out."""

from __future__ import annotations

import resource
import signal
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from errors import UserError
from readers import DataError
from readers.films import silence_opencv
from tests.tiny import files_below, photo
from video import VideoReader
from writers import FormatError, FrameFolder, VideoWriter


def film(count: int, height: int = 48, width: int = 80, seed: int = 0) -> list[np.ndarray]:
    """A still picture that moves to the right, frame by frame, (height, width, 3) uint8 each."""
    picture = photo(seed, height, width)
    return [np.roll(picture, 4 * number, axis=1) for number in range(count)]


def write_film(path: Path, frames: list[np.ndarray], codec: str = "mp4v", rate: float = 12.5) -> Path:
    silence_opencv()
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame[..., ::-1].copy())
    writer.release()
    return path


def turn(path: Path) -> None:
    """Rewrite the matrix of an .mp4's track header as a phone that is held upright does: a quarter clockwise."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36])[::8] == (0x10000, 0x40000000)
    width = struct.unpack(">i", content[matrix + 36 : matrix + 40])[0]
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, width, 0, 0x40000000)
    path.write_bytes(content)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


# ---------------------------------------------------------------- frames in


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "mp4v"), ("mov", "mp4v"), ("m4v", "mp4v"), ("avi", "MJPG"), ("mkv", "mp4v"), ("webm", "VP90")],
)
def test_frames_come_in_order_as_rgb(tmp_path: Path, suffix: str, codec: str) -> None:
    frames = film(12)
    video = VideoReader(write_film(tmp_path / f"a.{suffix}", frames, codec))
    assert (video.rate, video.count) == (12.5, 12)
    seen = list(video)
    assert len(seen) == 12
    assert all(difference(one, other) < 6 for one, other in zip(seen, frames, strict=True))


def test_a_rotated_video_comes_upright(tmp_path: Path) -> None:
    frames = film(3)
    path = write_film(tmp_path / "phone.mp4", frames)
    turn(path)
    seen = list(VideoReader(path))
    assert [frame.shape for frame in seen] == [(80, 48, 3)] * 3
    assert difference(seen[0], np.rot90(frames[0], -1)) < 6


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4", "webm"])
def test_half_a_video_is_a_fault(tmp_path: Path, suffix: str) -> None:
    path = write_film(tmp_path / f"a.{suffix}", film(20), "VP90" if suffix == "webm" else "mp4v")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: (cannot be read|is damaged or cut off)"):
        list(VideoReader(path))


def test_frames_that_cannot_be_decoded_are_a_fault(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", film(20))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    stop = content.index(b"moov")
    middle = slice(start + (stop - start) // 4, stop - 8)
    content[middle] = b"U" * (middle.stop - middle.start)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: is damaged or cut off: it ends after \d+\.\d+ of 1.60 seconds"):
        list(VideoReader(path))


@pytest.mark.parametrize("content", [b"", b"no video" * 100])
def test_what_is_no_video_is_a_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: cannot be read as a video"):
        VideoReader(tmp_path / "a.mp4")


# ---------------------------------------------------------------- frames out


def append_all(writer: VideoWriter | FrameFolder, frames: list[np.ndarray], error: Exception | None = None) -> None:
    """What a `with` block does, which may end in an error."""
    with writer:
        for frame in frames:
            writer.append(frame)
        if error:
            raise error


def test_a_video_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    frames = film(5)
    with VideoWriter(tmp_path / "new/a.b.mp4", 29.97, (48, 80)) as video:
        for frame in frames:
            video.append(frame)
            assert not (tmp_path / "new/a.b.mp4").exists()
    assert files_below(tmp_path) == {"new/a.b.mp4"}
    reader = VideoReader(tmp_path / "new/a.b.mp4")
    assert (reader.rate, reader.count) == (29.97, 5)
    assert all(difference(one, other) < 6 for one, other in zip(reader, frames, strict=True))


@pytest.mark.parametrize(
    "writer", [lambda path: VideoWriter(path / "a.mp4", 25, (48, 80)), lambda path: FrameFolder(path / "a")]
)
def test_an_exception_leaves_nothing(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(KeyError):
        append_all(writer(tmp_path), film(2), KeyError())
    assert list(tmp_path.iterdir()) == []


def test_what_the_encoder_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="9000x48"):
        VideoWriter(tmp_path / "a.mp4", 25, (48, 9000))


def test_a_full_disk_is_noticed_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        noise = np.random.default_rng(0)
        frames = [noise.integers(0, 256, (240, 320, 3), dtype=np.uint8) for _ in range(20)]
        with pytest.raises(UserError, match=r"cannot write .*a\.mp4"):
            append_all(VideoWriter(tmp_path / "a.mp4", 25, (240, 320)), frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_below(tmp_path) == set()


def test_frames_of_a_longer_video_of_that_name_go(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    for count in (4, 2):
        with FrameFolder(tmp_path / "a") as folder:
            for frame in film(count):
                folder.append(frame)
    assert files_below(tmp_path) == {"a/000001.png", "a/000002.png", "a/notes.txt"}
