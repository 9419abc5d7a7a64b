"""A run of a tiny model with random weights, as the commands that start from a checkpoint find it on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

import checkpoint
from config import BiRefNetSettings, Config, as_dict
from models import create_model

SETTINGS: dict[str, Any] = {"backbone": "pvt_v2_b0", "decoder_attention": "none", "multi_scale_input": "none"}
SIDE = 64


def tiny_model(seed: int = 0) -> Any:
    """In evaluation mode; its head is scaled up so that masks reach from black to white."""
    torch.manual_seed(seed)
    model = create_model("birefnet", **SETTINGS).eval()
    with torch.no_grad():
        head = [parameter for name, parameter in model.named_parameters() if name.startswith("decoder.")][-2:]
        probe = model.predict(torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))["logits"]
        head[0].mul_(2 / probe.std())
        head[1].sub_(probe.mean()).mul_(2 / probe.std())
    return model


def write_run(folder: Path, model: Any, *, ema: Any = None, config: Config | None = None) -> Path:
    """A run folder with best.pth; returns the folder."""
    config = config or Config(model=BiRefNetSettings(**SETTINGS))
    config.data.size = [SIDE, SIDE]
    meta = {
        "family": "birefnet",
        "settings": SETTINGS,
        "task": "binary",
        "size": config.data.size,
        "class_names": [],
        "experiment_name": folder.name,
        "config": as_dict(config),
    }
    folder.mkdir(parents=True)
    weights = {"model": model.state_dict(), "ema": ema.state_dict() if ema else None}
    checkpoint.save(folder / "best.pth", {"format": 1, "meta": meta, **weights})
    return folder


def expected_probabilities(model: Any, image: np.ndarray, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """The official path written out: (H, W, 3) uint8 RGB -> (H, W) float32 probabilities; `size` is (width, height)."""
    small = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
    normal = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = model(torch.from_numpy(normal.transpose(2, 0, 1).astype(np.float32))[None])["logits"]
        maps = torch.nn.functional.interpolate(logits.sigmoid(), image.shape[:2], mode="bilinear", align_corners=True)
    return maps[0, 0].numpy()


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured picture, (height, width, 3) uint8, that looks the same from no two sides."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
