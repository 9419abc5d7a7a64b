"""Print the table of every family and size that README.md holds: `python variants.py`; `--write` puts it there.

Models are built without memory for their weights and asked for the operations of one picture, so it takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from config import Kind, default_config, default_task
from errors import UserError, run_command
from generated import Generated, markdown
from models import FAMILIES, create_model
from settings import FAMILY_SETTINGS

README = Generated("variants.py", Path(__file__).resolve().parent / "README.md")
COLUMNS = ("family", "size", "parameters", "G multiply-additions", "input", "published weights", "their licence")
TIMM_LICENCES = {
    "apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "dinov3-license": "DINOv3 License",
}  # fmt: skip
TIMM = "hf-hub:timm/"
NUM_CLASSES = 80  # of the models that are counted, where they have classes

# Of weights by who publishes them, as they say: BiRefNet, Swin, PVT and SAM 2 in their repositories, RF-DETR, SegFormer
# and DINOv2 beside the weights, torchvision of its code (weights may have the terms of their data). timm knows its own.
LICENCES = {
    "hf-hub:ZhengPeng7/": "MIT",
    "hf-hub:nvidia/": "NVIDIA, non-commercial",
    "hf-hub:facebook/": "Apache-2.0",
    "https://storage.googleapis.com/rfdetr/": "Apache-2.0",
    "https://dl.fbaipublicfiles.com/segment_anything_2/": "Apache-2.0",
    "https://github.com/SwinTransformer/": "MIT",
    "https://github.com/whai362/": "Apache-2.0",
    "https://download.pytorch.org/": "BSD-3-Clause",
}


def sizes_of(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each size: the choices of `variant` or `backbone`, each with `masks` and without."""
    hints = get_type_hints(FAMILY_SETTINGS[family])
    key = "variant" if "variant" in hints else "backbone"
    default = getattr(FAMILY_SETTINGS[family](), key)
    names = get_args(hints[key]) if get_origin(hints[key]) is Literal else [default]
    classes = {"num_classes": NUM_CLASSES} if "num_classes" in hints else {}
    for masks in (True, False) if "masks" in hints else (True,):
        for name in names:
            yield (
                name if masks else f"{name}, boxes alone",
                {key: name, **classes, **({} if masks else {"masks": False})},
            )


def row_of(family: str, name: str, settings: dict[str, Any]) -> list[str] | None:
    """The cells of one size, None where there is no such."""
    with torch.device("meta"):
        try:
            model = create_model(family, **settings).eval().requires_grad_(False)
        except UserError:
            return None
        width, height = model.default_size or default_config(Kind(family, default_task(family))).data.size
        with FlopCounterMode(display=False) as counter:
            model.predict(torch.empty(1, 3, height, width))
    published = model.published_weights()
    address = published.get("official") or published.get("backbone", "")
    what = "" if "official" in published or not address else " (encoder)"
    count = sum(parameter.numel() for parameter in model.parameters())
    return [family, name, f"{count / 1e6:.1f} M", f"{counter.get_total_flops() / 2e9:.1f}", f"{width}×{height}",
            f"{origin(address)}{what}", licence(address)]  # fmt: skip


def origin(address: str) -> str:
    """An address as people read it."""
    return address.removeprefix("https://").removeprefix("hf-hub:").split("/releases/")[0] or "none"


def licence(address: str) -> str:
    """Of the weights behind an address; an unknown publisher is a mistake of this table."""
    if address.startswith(TIMM):
        about: Any = timm.get_pretrained_cfg(address.removeprefix(TIMM))
        return TIMM_LICENCES.get(about.license, about.license or "as its page says")
    return next(name for pattern, name in LICENCES.items() if re.match(pattern, address)) if address else ""


def table() -> str:
    """The table in Markdown."""
    rows = [
        row for family in FAMILIES for name, settings in sizes_of(family) if (row := row_of(family, name, settings))
    ]
    return markdown(COLUMNS, rows, ["---"] * 2 + ["---:"] * 3 + ["---"] * 2)


if __name__ == "__main__":
    run_command(lambda: README.command(table))
