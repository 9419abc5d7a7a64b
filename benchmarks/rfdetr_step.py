"""One RF-DETR training step beside that of the official package: model, criterion, optimizer and averaged weights, each
as its own program trains (in float32 the package's AdamW is not fused).

    python benchmarks/rfdetr_step.py --variant nano --size 312 --batch_size 2 --objects 5 100 --threads 1

Both are measured in one run, in turn, from the same weights: medians of seconds on the wall and of seconds of the CPU,
which other programs on the machine disturb less, and their ratios (above 1, ours is faster); likewise evaluation
forward passes. Peak memory is that of a process of its own for each. Without the package (`pip install rfdetr`, which
the program itself does not need) only ours runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from instance_loss import InstanceCriterion
from models import create_model
from models.rfdetr.variants import SEGMENTATION
from optim import build_optimizer
from samples import InstanceTarget
from utils import EMA, gradient_norm

Step = Callable[[], None]
Maker = Callable[[argparse.Namespace], tuple[Step, Step]]
CLASSES = 90
LR, CLIPPED_TO, EMA_DECAY = 1e-4, 0.1, 0.993


def main() -> None:
    options = parse_options()
    makers: dict[str, Maker] = {"ours": ours}
    if find_spec("rfdetr"):
        makers["official"] = official
    cases = [argparse.Namespace(**{**vars(options), "objects": objects}) for objects in options.objects]
    # First, while this process is small: those that it starts count its peak as theirs.
    memory = [{name: in_own_process(make, case) for name, make in makers.items()} for case in cases]
    for case, peaks in zip(cases, memory, strict=True):
        shape = f"{case.size}² batch {case.batch_size}, {case.objects} objects an image"
        print(f"{case.variant} {shape}, {case.threads} threads, {case.device}, {'bf16' if case.bf16 else 'fp32'}")
        compare(makers, case)
        for name, peak in peaks.items():
            print(f"{'peak memory':>14}, {name:>8}: {peak:.0f} MB")
        if len(peaks) == 2:
            print(f"{'peak memory':>14}, {'ratio':>8}: {peaks['official'] / peaks['ours']:.2f}", flush=True)


def in_own_process(make: Maker, options: argparse.Namespace) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (make, options))


def compare(makers: dict[str, Maker], options: argparse.Namespace) -> None:
    """Measure in turn and print the times of one case."""
    torch.set_num_threads(options.threads)
    pairs = {name: make(options) for name, make in makers.items()}
    for index, what in enumerate(("training step", "evaluation")):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
        for number in range(options.warmup + options.steps):
            for name, pair in pairs.items():
                seconds = timed(pair[index], options.device)
                if number >= options.warmup:
                    times[name].append(seconds)
        medians = {name: [median(kind) for kind in zip(*seconds, strict=True)] for name, seconds in times.items()}
        for name, (wall, cpu) in medians.items():
            print(f"{what:>14}, {name:>8}: {wall:.3f} s, {cpu:.3f} s of the CPU")
        if len(medians) == 2:
            ratios = [theirs / own for theirs, own in zip(medians["official"], medians["ours"], strict=True)]
            print(f"{what:>14}, {'ratio':>8}: {ratios[0]:.2f}, {ratios[1]:.2f} of the CPU")


def timed(step: Step, device: str) -> tuple[float, float]:
    """(seconds on the wall, seconds of the CPU)."""
    began = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def ours(options: argparse.Namespace) -> tuple[Step, Step]:
    """(training step: forward, matching, losses, backward, clipping, update and average; evaluation forward pass)."""
    model = create_model("rfdetr", variant=options.variant, num_classes=CLASSES).to(options.device).train()
    criterion = InstanceCriterion({"class": 1.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0})
    labels, boxes, masks = objects_of(options)
    counts = [options.objects] * options.batch_size
    numbers = torch.arange(1, options.objects + 1, dtype=torch.int16)[:, None, None]
    maps = masks * numbers  # each object in a layer of its own, for they overlap
    target = InstanceTarget(
        counts, labels.flatten(), boxes.flatten(0, 1), maps, torch.arange(options.objects).repeat(options.batch_size)
    )
    batch: Any = SimpleNamespace(images=images_of(options), targets=target.to(options.device))
    optimizer = build_optimizer(
        [{"params": list(model.parameters())}], name="adamw", lr=LR, weight_decay=LR, betas=[0.9, 0.999], momentum=0
    )
    average, good = EMA(model, EMA_DECAY), torch.ones((), device=options.device)

    def update() -> None:
        parameters = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grads_with_norm_(parameters, CLIPPED_TO, gradient_norm(parameters))
        optimizer.step()
        average.update(model, good)

    return steps(model, batch.images, lambda: criterion_sum(criterion, model, batch), update, options)


def criterion_sum(criterion: InstanceCriterion, model: Any, batch: Any) -> torch.Tensor:
    return torch.stack(list(criterion(model(batch), batch, criterion.counts(batch)).values())).sum()


def official(options: argparse.Namespace) -> tuple[Step, Step]:
    """The same with the package's own model and criterion."""
    warnings.filterwarnings("ignore")
    config: Any = import_module("rfdetr.config")
    models: Any = import_module("rfdetr.models")
    name = {"2xlarge": "2XLarge", "xlarge": "XLarge"}.get(options.variant, options.variant.title())
    settings = getattr(config, f"RFDETRSeg{name}Config")(pretrain_weights=None, device=options.device)
    training = config.SegmentationTrainConfig(dataset_dir=".", output_dir=".")
    model = models.build_model_from_config(settings, training).to(options.device).train()
    ours = create_model("rfdetr", variant=options.variant, num_classes=CLASSES)
    model.load_state_dict(ours.official_state_dict())
    criterion, _ = models.build_criterion_from_config(settings, training)
    criterion = criterion.to(options.device).train()
    labels, boxes, masks = (tensor.to(options.device) for tensor in objects_of(options))
    targets = [{"labels": labels[i], "boxes": boxes[i], "masks": masks[i]} for i in range(options.batch_size)]
    images = images_of(options)

    def loss() -> torch.Tensor:
        losses = criterion(model(images, targets), targets)
        return sum(losses[key] * weight for key, weight in criterion.weight_dict.items() if key in losses)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=LR, fused=options.bf16)
    average = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_TO)
        optimizer.step()
        average.update_parameters(model)

    return steps(model, images, loss, update, options)


def steps(
    model: Any, images: torch.Tensor, loss: Callable[[], torch.Tensor], update: Step, options: argparse.Namespace
) -> tuple[Step, Step]:
    precision = torch.autocast(options.device, torch.bfloat16, enabled=options.bf16)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with precision:
            total = loss()
        total.backward()
        update()

    def evaluate() -> None:
        model.eval()
        with torch.inference_mode(), precision:
            model(images)

    return train, evaluate


def images_of(options: argparse.Namespace) -> torch.Tensor:
    shape = (options.batch_size, 3, options.size, options.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.device)


def objects_of(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classes (B, n), boxes (B, n, 4) and masks (B, n, H, W) of ellipses."""
    random = torch.rand(options.batch_size, options.objects, 5, generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([0.25 + 0.5 * random[..., :2], 0.1 + 0.3 * random[..., 2:4]], -1)
    places = (torch.arange(options.size) + 0.5) / options.size
    x = (places - boxes[..., :1]) / (boxes[..., 2:3] / 2)
    y = (places - boxes[..., 1:2]) / (boxes[..., 3:] / 2)
    masks = x[..., None, :] ** 2 + y[..., None] ** 2 <= 1
    return (random[..., 4] * CLASSES).long(), boxes, masks


def peak_memory(make: Maker, options: argparse.Namespace) -> float:
    """Megabytes that two training steps add to what the process held before the first."""
    torch.set_num_threads(options.threads)
    step, _ = make(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="nano", choices=list(SEGMENTATION))
    parser.add_argument("--size", type=int, default=312)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--objects", type=int, nargs="+", default=[5, 100], help="in each image, a case for each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
