"""What all readers are: samples in a fixed order, and the faults seen while listing them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError
from samples import Sample


@dataclass(frozen=True)
class Fault:
    """Something wrong with the data: a path and what is wrong there."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class DataError(UserError):
    """A file that cannot be used. `fault` says which and why."""

    def __init__(self, fault: Fault | str):
        if isinstance(fault, str):
            # A DataLoader worker passes an exception on as its printed traceback, whose last line is the sentence.
            path, _, problem = fault.rsplit("DataError: ", 1)[-1].strip().partition(": ")
            fault = Fault(path, problem)
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True)
class DatasetSummary:
    count: int
    weight: float  # how often an epoch takes each of its samples


class Reader(ABC):
    """Samples in a fixed order that no file system decides, and the faults seen while listing them."""

    faults: Sequence[Fault] = ()
    class_names: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Decode one sample; `DataError` names the file that cannot be used."""

    @abstractmethod
    def sample_id(self, index: int) -> str: ...

    @abstractmethod
    def dataset_of(self, index: int) -> str: ...

    @abstractmethod
    def files(self, index: int) -> list[str]:
        """The files that the sample is read from."""

    def weight_of(self, dataset: str) -> float:
        """How often the sampler takes each sample of this dataset in an epoch."""
        return 1.0

    def find_faults(self, index: int) -> list[Fault]:
        """Everything wrong with one sample, by decoding all of it."""
        try:
            self.read(index)
        except DataError as error:
            return [error.fault]
        return []

    def findings(self) -> Any:
        """What the check learned of the samples beside faults, for `adopt` on ranks that did not run it."""
        return None

    def adopt(self, findings: Any) -> None:
        """Take over the `findings` of another rank's reader of the same data."""
        assert findings is None

    def origin(self, index: int) -> tuple[Reader, int]:
        """The reader that a sample is really read by, and its index there."""
        return self, index

    def image_id(self, index: int) -> int | str:
        """What stands for a sample's image in the data's own files, where results are to be written with it."""
        return self.sample_id(index)

    @property
    def file_ids(self) -> Sequence[int | str]:
        """What stands for each class in the data's own files, where results are to be written with it."""
        return ()

    @property
    def datasets(self) -> dict[str, DatasetSummary]:
        """{name: (count, weight)} in order of appearance."""
        return {name: DatasetSummary(len(found), self.weight_of(name)) for name, found in self.by_dataset().items()}

    def by_dataset(self) -> dict[str, list[int]]:
        """{name: indices} in order of appearance."""
        found: dict[str, list[int]] = defaultdict(list)
        for index in range(len(self)):
            found[self.dataset_of(index)].append(index)
        return found


class Subset(Reader):
    """Some samples of another reader, in the order given."""

    def __init__(self, reader: Reader, indices: Sequence[int], *, faults: Sequence[Fault] | None = None):
        self.reader, self.indices = reader, list(indices)
        self.faults = reader.faults if faults is None else faults
        self.class_names = reader.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        return self.reader.read(self.indices[index])

    def find_faults(self, index: int) -> list[Fault]:
        return self.reader.find_faults(self.indices[index])

    def origin(self, index: int) -> tuple[Reader, int]:
        return self.reader.origin(self.indices[index])

    def sample_id(self, index: int) -> str:
        return self.reader.sample_id(self.indices[index])

    def dataset_of(self, index: int) -> str:
        return self.reader.dataset_of(self.indices[index])

    def files(self, index: int) -> list[str]:
        return self.reader.files(self.indices[index])

    def weight_of(self, dataset: str) -> float:
        return self.reader.weight_of(dataset)

    def image_id(self, index: int) -> int | str:
        return self.reader.image_id(self.indices[index])

    @property
    def file_ids(self) -> Sequence[int | str]:
        return self.reader.file_ids
