"""Readers: they list what is on disk, collect every fault they see, and decode one sample at a time, strictly.

    reader = BinaryFolders("DIS5K+HRSOD:0.5", root="data")
    fail_on(check(reader))
    training = split(reader, part="train", fold="0/5", seed=0)

Apart from dataset.py, which turns samples into batches: this is what grows with every format. Sizes are always
(height, width).
"""

from readers.base import DataError, DatasetSummary, Fault, Reader, Subset
from readers.binary import BinaryFolders
from readers.cache import Cached
from readers.checks import check, drop, fail_on
from readers.image_list import ImageList
from readers.images import read_alpha, read_image
from readers.instance import InstanceReader, instance_reader, instance_table, object_table
from readers.masks import FinishedMasks
from readers.semantic import SemanticReader, class_table, pixel_counts, semantic_reader, show_classes
from readers.splits import limit, split
from readers.video import ClipReader, video_reader, video_table

__all__ = [
    "BinaryFolders",
    "Cached",
    "ClipReader",
    "DataError",
    "DatasetSummary",
    "Fault",
    "FinishedMasks",
    "ImageList",
    "InstanceReader",
    "Reader",
    "SemanticReader",
    "Subset",
    "check",
    "class_table",
    "drop",
    "fail_on",
    "instance_reader",
    "instance_table",
    "limit",
    "object_table",
    "pixel_counts",
    "read_alpha",
    "read_image",
    "semantic_reader",
    "show_classes",
    "split",
    "video_reader",
    "video_table",
]
