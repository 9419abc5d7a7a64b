"""Streaming metrics, one class per task, and the field's formulas behind them."""

from metrics.base import Row, StreamingMetric
from metrics.binary import BinaryMetric
from metrics.instance import InstanceMetric
from metrics.semantic import SemanticMetric
from metrics.video import VideoMetric

__all__ = ["BinaryMetric", "InstanceMetric", "Row", "SemanticMetric", "StreamingMetric", "VideoMetric"]
