"""What wraps `model.predict`: test-time augmentation.

A room of its own because evaluation and inference both do it, and no one imports an entry script.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samples import Batch


def predict(model: Any, batch: Batch, tta: bool = False) -> dict[str, Tensor]:
    """`model.predict(batch)`; with `tta` the mean probability over the images and their mirror images, as logits.

    Where both are sure to the last bit, the logits are infinite: their sigmoid is 0 or 1 again.
    """
    predictions = model.predict(batch)
    if not tta:
        return predictions
    mirrored = model.predict(Batch(batch.images.flip(-1), None, batch.samples))["logits"].flip(-1)
    mean = (predictions["logits"].sigmoid() + mirrored.sigmoid()) / 2
    return {**predictions, "logits": torch.logit(mean)}
