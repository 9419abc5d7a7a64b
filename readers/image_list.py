"""Images without annotations, for inference."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from readers.base import Fault, Reader
from readers.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES, walk_images
from readers.images import read_image
from samples import Sample


class ImageList(Reader):
    """Images alone, for inference: files, folders (with all below them) and glob patterns.

    `sample_id` is the path without suffix relative to the folder, to the pattern's fixed part, or to the file's
    folder, so that outputs can keep names and structure. Videos among them are no samples: `videos` holds their paths
    by their ids.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.faults: list[Fault] = []
        self._entries: dict[str, str] = {}  # sample id -> path
        self.videos: dict[str, str] = {}
        for path in paths:
            files, base = self._expand(path)
            if not files:
                self.faults.append(
                    Fault(os.fspath(path), "is no image or video, no folder with any and no pattern that matches any")
                )
            for file in files:
                sample_id = file.relative_to(base).with_suffix("").as_posix()
                entries = self.videos if file.name.lower().endswith(VIDEO_SUFFIXES) else self._entries
                known = entries.setdefault(sample_id, str(file))
                if not os.path.samefile(known, file):
                    self.faults.append(Fault(str(file), f"would write the same outputs as {known}"))
        self._ids = list(self._entries)

    def _expand(self, path: str | os.PathLike[str]) -> tuple[list[Path], Path]:
        """The files that one argument means, and the folder that their ids are relative to."""
        suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
        if os.path.isdir(path):
            return walk_images(Path(path), self.faults, suffixes), Path(path)
        if os.path.exists(path):
            return [Path(path)], Path(path).parent
        matches = sorted(glob.glob(os.fspath(path), recursive=True))
        return [Path(m) for m in matches if m.lower().endswith(suffixes)], _fixed_part(path)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        path = self._entries[self._ids[index]]
        return Sample(frames=[read_image(path)], sample_id=self._ids[index], path=path)

    def sample_id(self, index: int) -> str:
        return self._ids[index]

    def dataset_of(self, index: int) -> str:
        return ""

    def files(self, index: int) -> list[str]:
        return [self._entries[self._ids[index]]]


def _fixed_part(pattern: str | os.PathLike[str]) -> Path:
    """The leading folders of a glob pattern, up to the first with a wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1]))
