"""Which frames a frame remembers, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPTED = 7  # the moment of frames with a prompt, whenever they were
RECENT = 6  # frames before this one whose memories count
POINTERS = 16  # frames whose pointers count, this one included


@dataclass(frozen=True)
class Recall:
    """Frames with their moments: of memories 1 to 6 (frames away) or 7, of pointers any number of frames away."""

    memories: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    longest: int  # the way in time that pointers' moments are shares of

    def moments(self, device: torch.device) -> Tensor:
        """(R,) int64, of the memories."""
        return to_device([moment for _, moment in self.memories], device)

    def steps(self, device: torch.device) -> Tensor:
        """(P,) float32, of the pointers, as shares of the longest way."""
        return to_device([away / self.longest for _, away in self.pointers], device)


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """A tensor of these, without waiting for the device."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def recall(
    frame: int,
    prompted: Iterable[int],
    tracked: Collection[int],
    num_frames: int | None = None,
    reverse: bool = False,
    future: bool = False,
    stride: int = 1,
) -> Recall:
    """What to remember in a frame.

    Args:
        prompted: frames with a prompt, in the order in which they came to be.
        tracked: the other frames that were seen already.
        num_frames: of the whole video, where it is known.
        reverse: time runs backwards.
        future: also pointers of prompted frames that are still to come, as in training.
        stride: memories of every so-manieth frame, and always of the last one.
    """
    step = -1 if reverse else 1
    prompted = list(prompted)
    recent = recent_frames(frame, step, stride)
    memories = [(other, PROMPTED) for other in prompted]
    memories += [(other, away) for away, other in recent if other in tracked]

    reach = POINTERS if num_frames is None else min(num_frames, POINTERS)
    pointers = [(other, (frame - other) * step) for other in prompted]
    pointers = [(other, away) for other, away in pointers if future or away >= 0]
    pointers += [(frame - away * step, away) for away in range(1, reach) if frame - away * step in tracked]
    return Recall(tuple(memories), tuple(pointers), max(reach - 1, 1))


def recent_frames(frame: int, step: int, stride: int) -> list[tuple[int, int]]:
    """(moment, frame) from the oldest to the last one. With a stride, the others lie on its multiples."""
    frame *= step  # in the direction of time
    nearest = (frame - 2) // stride * stride
    moments = range(RECENT, 1, -1)
    return [(moment, step * (nearest - (moment - 2) * stride)) for moment in moments] + [(1, step * (frame - 1))]
