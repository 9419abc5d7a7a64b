"""A classifier: any of timm's networks with a linear head, one class for each picture.

The worked example of docs/adding_a_family.md, which builds it line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from errors import UserError, nearest
from models.base import KeyTable, LoadReport, Logits, Model


class Classifier(Model):
    """`logits` (B, classes) of images (B, 3, H, W), in training and in evaluation.

    Args:
        backbone: one of timm's networks by name; `timm.list_models()` has them.
        num_classes: at least 1.
        drop_path: stochastic depth, for networks that have it.
        dropout: before the head.
    """

    encoder = "backbone."
    backbone: Any

    def __init__(
        self, backbone: str = "resnet18", num_classes: int = 0, drop_path: float = 0.0, dropout: float = 0.0
    ) -> None:
        """Raises `UserError` for an unknown network, without classes, and for depth that is never stochastic."""
        super().__init__()
        if not timm.is_model(backbone):
            raise UserError(f"model.backbone: timm has no network {backbone!r}{nearest(backbone, timm.list_models())}")
        if num_classes < 1:
            raise UserError("model.num_classes is 0, which stands for the classes of the data, but there is no data")
        self.name = backbone
        try:
            depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
            self.backbone = timm.create_model(backbone, num_classes=0, **depth)
        except TypeError:
            raise UserError(f"model.drop_path: the network {backbone} has no stochastic depth; set it to 0") from None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(getattr(self.backbone, "head_hidden_size", self.backbone.num_features), num_classes)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"logits": self.head(self.dropout(self.backbone(getattr(batch, "images", batch))))}

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """One graph: normalised `images` (B, 3, H, W) → `logits` (B, classes), of one size where networks do."""
        about = self.backbone.default_cfg
        sides = {} if about.get("fixed_input_size") else {2: "height", 3: "width"}
        axes = {"images": {0: "batch", **sides}, "logits": {0: "batch"}}
        return {"classifier": (Logits(self), (torch.zeros(2, *about["input_size"]),), axes)}

    # --- timm's weights -------------------------------------------------------------------------------------------

    def published_weights(self) -> dict[str, str]:
        """Address of timm's own weights, most of them trained on ImageNet."""
        published = timm.get_pretrained_cfg(self.name)
        return {"backbone": f"hf-hub:{published.hf_hub_id}"} if published and published.hf_hub_id else {}

    def official_keys(self) -> KeyTable:
        """timm's keys: what is the head here is the network's own there."""
        return [("", "backbone"), (self.backbone.default_cfg["classifier"], "head")]

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load all but the head."""
        report, head = self.load_official(state_dict), self.backbone.default_cfg["classifier"]
        report.missing = [key for key in report.missing if not key.startswith(f"{head}.")]
        return report

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Raises `UserError`, for weights of timm's do not say which of its networks they belong to."""
        raise UserError("these weights do not say which network they belong to: name it as model.backbone")
