"""Which frames and objects of a clip training looks at, and what becomes of them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from clips import AugmentClip, ClipDataset, DrawClip, collate_video, video_target, walk
from dataset import EvalSampler, TrainSampler, build_loader, normalize
from readers import DataError, Reader
from samples import Sample, SampleKey
from streams import FrameStream, resized
from transforms import OFFICIAL_VIDEO, Augment

SIZE = (40, 56)


class Squares:
    """Two objects, 3 and 7, on `length` frames: a square that moves to the right, and one from frame 2 on."""

    object_ids = (3, 7)

    def __init__(self, length: int, known: Sequence[int] | None = None):
        self.annotated = [known is None or t in known for t in range(length)]

    def visible(self, frame: int) -> list[int]:
        return [0, 1] if frame >= 2 else [0]

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        assert self.annotated[frame]
        masks = np.zeros((2, *SIZE), bool)
        masks[0, 5:15, 4 + 2 * frame : 14 + 2 * frame] = True
        masks[1, 25:35, 30:40] = frame >= 2
        return masks[list(objects)]


class Frames(Sequence[np.ndarray]):
    """Frames whose pixels tell which they are, and which are white where the first object is."""

    def __init__(self, length: int):
        self.length = length
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        self.decoded.append(number)
        frame = np.full((*SIZE, 3), 10 + number, np.uint8)
        frame[Squares(self.length).masks(number, [0])[0]] = 255
        return frame


def clip(length: int = 9, known: Sequence[int] | None = None) -> Sample:
    return Sample(Frames(length), Squares(length, known), sample_id="clip", path="clips/clip", dataset="set")


class Clips(Reader):
    """Clips of these lengths."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> Sample:
        return clip(self.lengths[index])

    def sample_id(self, index: int) -> str:
        return str(index)

    def dataset_of(self, index: int) -> str:
        return "set"

    def files(self, index: int) -> list[str]:
        return []


def drawn(sample: Sample, count: int, **options: Any) -> list[list[int]]:
    """The frames that are drawn in `count` epochs."""
    settings = {"frames": 4, "stride": [1, 1], "objects": 3, "reverse": 0.0, "seed": 0, **options}
    found = []
    for epoch in range(count):
        chosen = DrawClip(**settings)(sample, SampleKey(epoch, 0, 0, SIZE))
        found.append([int(frame[-1, -1, 0]) - 10 for frame in chosen.frames])
    return found


def test_consecutive_frames_anywhere_in_the_clip() -> None:
    found = drawn(clip(), 60)
    assert {tuple(np.diff(numbers)) for numbers in found} == {(1, 1, 1)}
    assert {numbers[0] for numbers in found} == set(range(6))
    assert found == drawn(clip(), 60)
    assert found != drawn(clip(), 60, seed=1)


def test_strides_as_far_as_the_clip_goes_and_both_directions() -> None:
    found = drawn(clip(), 60, stride=[1, 9], reverse=0.5)
    assert {abs(numbers[1] - numbers[0]) for numbers in found} == {1, 2}
    assert {numbers[1] > numbers[0] for numbers in found} == {True, False}


def test_only_frames_that_are_drawn_are_decoded_each_once() -> None:
    sample = clip()
    chosen = DrawClip(frames=4, stride=[1, 1], objects=3, reverse=0, seed=0)(sample, SampleKey(0, 0, 0, SIZE))
    assert len(chosen.frames) == 4
    assert isinstance(sample.frames, Frames)
    assert len(sample.frames.decoded) == 4


def test_short_clips_go_to_and_fro_and_unannotated_frames_are_passed_over() -> None:
    assert walk([0, 1, 2], 7) == [0, 1, 2, 1, 0, 1, 2]
    assert walk([5], 3) == [5, 5, 5]
    assert drawn(clip(2), 1) == [[0, 1, 0, 1]]
    assert {tuple(numbers) for numbers in drawn(clip(9, known=[0, 4, 8]), 20)} == {(0, 4, 8, 4)}


def test_at_most_so_many_objects_of_those_in_the_first_frame() -> None:
    for epoch in range(20):
        key = SampleKey(epoch, 0, 0, SIZE)
        every = DrawClip(frames=3, stride=[1, 1], objects=3, reverse=0, seed=0)(clip(), key)
        assert every.masks[0].shape[2] == (2 if every.frames[0][-1, -1, 0] >= 12 else 1)
        one = DrawClip(frames=3, stride=[1, 1], objects=1, reverse=0, seed=0)(clip(), key)
        assert all(masks.shape == (*SIZE, 1) and masks.any() for masks in one.masks)


def test_a_clip_without_objects_is_named() -> None:
    sample = clip()
    sample.masks.visible = lambda frame: []
    with pytest.raises(DataError, match=r"clips/clip: shows no object"):
        drawn(sample, 1)


def test_every_frame_gets_the_same_augmentation_and_masks_follow() -> None:
    sample = DrawClip(frames=4, stride=[1, 1], objects=3, reverse=0, seed=0)(clip(), SampleKey(0, 0, 0, SIZE))
    still = Sample([sample.frames[0]] * 4, [sample.masks[0]] * 4)
    for seed in range(10):
        same = AugmentClip(Augment(OFFICIAL_VIDEO))(still, (80, 112), np.random.SeedSequence(seed))
        assert all(np.array_equal(frame, same.frames[0]) for frame in same.frames[1:])
        assert all(np.array_equal(masks, same.masks[0]) for masks in same.masks[1:])
        moved = AugmentClip(Augment(OFFICIAL_VIDEO))(sample, (80, 112), np.random.SeedSequence(seed))
        for frame, masks in zip(moved.frames, moved.masks, strict=True):
            white = frame.min(2) > 150
            assert (white & masks[..., 0]).sum() > 0.85 * masks[..., 0].sum() > 0


def test_an_augmentation_that_takes_an_object_out_is_not_used() -> None:
    sample = DrawClip(frames=2, stride=[1, 1], objects=3, reverse=0, seed=0)(clip(), SampleKey(0, 0, 0, SIZE))
    away = AugmentClip(Augment([{"name": "Affine", "p": 1.0, "translate_percent": [3, 3]}]))
    kept = away(sample, SIZE, np.random.SeedSequence(0))
    assert np.array_equal(kept.frames[0], sample.frames[0])
    assert np.array_equal(kept.masks[1], sample.masks[1] == 1)


def loader(reader: Reader, sampler: Any, **options: Any) -> Any:
    return build_loader(
        ClipDataset(reader, make_target=video_target, **options), sampler, collate_targets=collate_video, workers=0
    )


def test_training_batches() -> None:
    reader = Clips([9, 1, 6])
    combine = DrawClip(frames=4, stride=[1, 2], objects=2, reverse=0.5, seed=0)
    sampler = TrainSampler(reader, batch_size=3, size=(64, 96))
    (batch,) = loader(reader, sampler, augment=AugmentClip(Augment(OFFICIAL_VIDEO)), combine=combine)
    targets = batch.targets
    assert batch.images.shape == (3, 4, 3, 64, 96)
    assert targets.masks.dtype == torch.bool
    assert targets.masks.shape == (len(targets.clips), 4, 64, 96)
    assert set(targets.clips.tolist()) == {0, 1, 2}
    assert [sample.size for sample in batch.samples] == [SIZE] * 3
    assert batch.channels_last().images.stride()[-3] == 1
    torch.testing.assert_close(batch.channels_last().images, batch.images)
    parts = batch.split(2)
    assert [len(part.images) for part in parts] == [1, 2]
    assert torch.equal(parts[1].targets.clips + 1, targets.clips[targets.clips > 0])
    assert torch.equal(torch.cat([part.targets.masks for part in parts]), targets.masks)


def test_evaluation_streams_whole_clips() -> None:
    reader = Clips([9, 3, 1])
    first, second = loader(reader, EvalSampler(3, batch_size=2, size=(64, 96)))
    assert len(first.images) == len(first.images.pin_memory().to("cpu")) == 2
    assert [len(list(frames)) for frames in first.images] == [9, 3]
    assert first.targets.masks.shape[:2] == (4, 0)
    assert [list(each.object_ids) for each in second.targets.originals] == [[3, 7]]
    (frames,) = second.images
    (frame,) = frames
    torch.testing.assert_close(frame, normalize(resized(Frames(1)[0], (64, 96))[None])[0])
    pickle.loads(pickle.dumps(FrameStream(Frames(3), SIZE)))


def test_previews_show_the_frames_one_below_the_other() -> None:
    combine = DrawClip(frames=3, stride=[1, 1], objects=2, reverse=0, seed=0)
    dataset = ClipDataset(Clips([9]), make_target=video_target, augment=AugmentClip(Augment([])), combine=combine)
    shown = dataset.prepared(SampleKey(0, 0, 0, SIZE))
    assert shown.frames[0].shape == (3 * SIZE[0], SIZE[1], 3)
    assert shown.masks.shape == (3 * SIZE[0], SIZE[1])
    assert 1 in shown.masks
