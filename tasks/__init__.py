"""The tasks, a row each: how samples are read, become targets and batches, are scored and are drawn."""

from __future__ import annotations

from errors import UserError, nearest
from tasks.base import MetricOptions, Scored, Task
from tasks.binary import BINARY
from tasks.classification import CLASSIFICATION
from tasks.instance import INSTANCE
from tasks.semantic import SEMANTIC
from tasks.video import VIDEO

__all__ = ["TASKS", "MetricOptions", "Scored", "Task", "get_task"]

TASKS = {task.name: task for task in (BINARY, SEMANTIC, INSTANCE, VIDEO, CLASSIFICATION)}


def get_task(name: str) -> Task:
    """The row of a task; an unknown name is a `UserError`."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name]
