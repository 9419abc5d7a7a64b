"""One SegFormer training step beside that of transformers' model with the usual upsampling and cross entropy.

    python benchmarks/segformer_step.py --variant b0 --size 512 --batch_size 2 --classes 81 --threads 1

Both are measured in one run, in turn, and the ratio of the medians is printed. Peak memory is that of a process of its
own for each. Without transformers (`pip install transformers`, which the program itself does not need) only ours runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import create_model
from models.segformer import VARIANTS
from samples import SemanticTarget
from semantic_loss import SemanticCriterion

Step = Callable[[], None]


def main() -> None:
    options = parse_options()
    makers = {"ours": ours} | ({"transformers": theirs} if find_spec("transformers") else {})
    context = multiprocessing.get_context("spawn")
    memory = {name: context.Pool(1).apply(peak_memory, (make, options)) for name, make in makers.items()}
    torch.set_num_threads(options.threads)
    steps = {name: make(options) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.warmup + options.steps):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= options.warmup:
                times[name].append(time.perf_counter() - began)
    shape = f"{options.size}² batch {options.batch_size}, {options.classes} classes"
    print(f"{options.variant} {shape}, {options.threads} threads")
    for name, seconds in times.items():
        print(f"{name:>12}: {median(seconds):.3f} s a step, peak memory {memory[name]:.0f} MB")
    if len(times) == 2:
        ratio = median(times["transformers"]) / median(times["ours"])
        print(f"{'ratio':>12}: {ratio:.2f} in time, {memory['transformers'] / memory['ours']:.2f} in memory")


def ours(options: argparse.Namespace) -> Step:
    """Forward, fused loss, backward and update."""
    model = create_model("segformer", variant=options.variant, num_classes=options.classes).train()
    criterion = SemanticCriterion({"ce": 1.0}, num_classes=options.classes)
    batch: Any = SimpleNamespace(images=images_of(options), targets=SemanticTarget(labels_of(options)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        counts = criterion.counts(batch)
        torch.stack(list(criterion(model(batch), batch, counts).values())).sum().backward()
        optimizer.step()

    return step


def theirs(options: argparse.Namespace) -> Step:
    """The same with transformers' model: logits upsampled to the labels, then F.cross_entropy."""
    transformers: Any = import_module("transformers")
    row = VARIANTS[options.variant]
    config = transformers.SegformerConfig(
        num_labels=options.classes, depths=list(row.depths), hidden_sizes=list(row.widths), decoder_hidden_size=row.head
    )
    model = transformers.SegformerForSemanticSegmentation(config).train()
    images, labels = images_of(options), labels_of(options).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = F.interpolate(model(images).logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        F.cross_entropy(logits, labels, ignore_index=255).backward()
        optimizer.step()

    return step


def images_of(options: argparse.Namespace) -> torch.Tensor:
    return torch.randn(options.batch_size, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))


def labels_of(options: argparse.Namespace) -> torch.Tensor:
    """Squares of 32 pixels, as labels are: areas, not noise."""
    side = -(-options.size // 32)
    shape = (options.batch_size, side, side)
    coarse = torch.randint(0, options.classes, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : options.size, : options.size]
    return labels.contiguous()


def peak_memory(make: Callable[[argparse.Namespace], Step], options: argparse.Namespace) -> float:
    """Megabytes that two steps add to what the process held before the first."""
    torch.set_num_threads(options.threads)
    step = make(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="b0", choices=list(VARIANTS))
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--classes", type=int, default=81)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
