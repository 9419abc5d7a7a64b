"""The families of models. A new one is a file, a row here, and a settings dataclass in settings.py."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from errors import UserError, nearest
from models.base import LoadReport, Model
from models.linear import use_linear

__all__ = ["FAMILIES", "Family", "LoadReport", "Model", "create_model", "infer_settings", "resolve"]


@dataclass(frozen=True)
class Family:
    """Where a family's parts live, as "module.name", so that nothing is imported before it is used."""

    model: str
    criteria: dict[str, str]  # of each task that it does


FAMILIES: dict[str, Family] = {
    "birefnet": Family("models.birefnet.BiRefNet", {"binary": "loss.BinaryCriterion"}),
    "segformer": Family(
        "models.segformer.SegFormer",
        {"semantic": "semantic_loss.SemanticCriterion", "binary": "loss.BinaryCriterion"},
    ),
    "rfdetr": Family("models.rfdetr.model.RFDETR", {"instance": "instance_loss.InstanceCriterion"}),
    "sam2": Family("models.sam2.model.Sam2", {"video": "video_loss.VideoCriterion"}),
    "classifier": Family("models.classifier.Classifier", {"classification": "classification.ClassificationCriterion"}),
}


def create_model(name: str, **settings: Any) -> Model:
    """Build a model of a family from keyword settings; those of its settings dataclass that steer the loading of
    weights (`family`, `pretrained`) are not among them. `UserError` names the nearest family or setting."""
    build = resolve(_family(name).model)
    known = list(signature(build).parameters)
    for key in settings:
        if key not in known:
            raise UserError(f"model.{key}: {name} has no such setting{nearest(key, known)}")
    model = build(**settings)
    use_linear(model)
    return model


def infer_settings(name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which `create_model` builds the model of an official checkpoint, from its tensors' shapes."""
    return resolve(_family(name).model).infer_settings(state_dict)


def resolve(dotted: str) -> Any:
    """The object that "module.name" stands for."""
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise UserError(f"model.family: there is no {name!r}{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def create_criterion(name: str, task: str, **settings: Any) -> Any:
    """The criterion of a family for a task, from keyword settings. `UserError` says which tasks the family does."""
    criteria = _family(name).criteria
    if task not in criteria:
        raise UserError(
            f"model.family {name} does not do the task {task}{nearest(task, criteria)}; it does: {', '.join(criteria)}"
        )
    return resolve(criteria[task])(**settings)


def infer_family(state_dict: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, settings) of an official checkpoint, from its keys and shapes; `UserError` when no family knows them."""
    for name in FAMILIES:
        try:
            return name, infer_settings(name, state_dict)
        except UserError:
            continue
    raise UserError(
        f"these weights belong to none of the families {', '.join(FAMILIES)}: name model.family and its settings"
    )
