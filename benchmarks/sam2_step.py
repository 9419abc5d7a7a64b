"""One SAM 2.1 training step on a clip beside that of the official code.

    python benchmarks/sam2_step.py --variant tiny --size 256 --frames 4 --objects 2 --clicks 7 --official path/to/sam2

Both prompt the first frame with a click, correct it with as many more, follow the objects to the end of the clip, and
take the official losses. They are measured in one run, in turn: medians of seconds on the wall and of seconds of the
CPU, which other programs disturb less, and their ratios. Peak memory is that of a process of its own for each.
`--official` is a clone of facebookresearch/sam2 (Apache-2.0; it needs hydra-core, iopath and tensordict); without it
only ours runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import create_model
from models.sam2.image_encoder import TRUNKS
from video_loss import VideoCriterion

Step = Callable[[], None]

CONFIGS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}  # as the official files are named


def main() -> None:
    options = parse_options()
    makers = {"ours": ours} | ({"official": theirs} if options.official else {})
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name, make in makers.items():
        with context.Pool(1) as pool:
            memory[name] = pool.apply(peak_memory, (make, options))
    torch.set_num_threads(options.threads)
    steps = {name: make(options) for name, make in makers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(options.warmup + options.steps):
        for name, step in steps.items():
            times[name].append(timed(step))
    wall, cpu = ({name: median(t[i] for t in own[options.warmup :]) for name, own in times.items()} for i in (0, 1))
    shape = f"{options.frames} frames of {options.size}², {options.objects} objects, {options.clicks} corrections"
    print(f"{options.variant} {shape}, {options.threads} threads, {'bf16' if options.bf16 else 'fp32'}")
    for name in steps:
        print(f"{name:>12}: {wall[name]:.2f} s a step, {cpu[name]:.2f} s of the CPU, peak memory {memory[name]:.0f} MB")
    if len(steps) == 2:
        of_wall, of_cpu, of_memory = (each["official"] / each["ours"] for each in (wall, cpu, memory))
        print(f"{'ratio':>12}: {of_wall:.2f} in time, {of_cpu:.2f} of the CPU, {of_memory:.2f} in memory")


def timed(step: Step) -> tuple[float, float]:
    """(seconds on the wall, seconds of the CPU)."""
    began = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def ours(options: argparse.Namespace) -> Step:
    """Forward, losses, backward and update."""
    model = create_model(
        "sam2",
        variant=options.variant,
        drop_path=0.0,  # as the official configurations have it
        point_prompts=1.0,
        box_prompts=0.0,
        conditioning_frames=1,
        corrected_frames=1,
        correction_clicks=options.clicks,
        true_clicks=0.0,
    ).train()
    criterion = VideoCriterion({"focal": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images, masks = clip_of(options)
    clips = torch.zeros(options.objects, dtype=torch.int64)
    batch: Any = SimpleNamespace(images=images[None], targets=SimpleNamespace(masks=masks, clips=clips))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        counts = criterion.counts(batch)
        with precision_of(options):
            outputs = model(batch)
            losses = criterion(outputs, batch, counts)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def theirs(options: argparse.Namespace) -> Step:
    """The same with the official model and losses."""
    sys.path.insert(0, options.official)
    config = import_module("omegaconf").OmegaConf.load(
        Path(options.official) / f"sam2/configs/sam2.1/sam2.1_hiera_{CONFIGS[options.variant]}.yaml"
    )
    settings = {
        "_target_": "training.model.sam2.SAM2Train",
        "image_size": options.size,
        "prob_to_use_pt_input_for_train": 1.0,
        "num_correction_pt_per_frame": options.clicks,
        "add_all_frames_to_correct_as_cond": True,
    }
    model = import_module("hydra.utils").instantiate({**config.model, **settings}).train()
    criterion = import_module("training.loss_fns").MultiStepMultiMasksAndIous(
        {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    images, masks = clip_of(options)
    frames = torch.arange(options.frames)[:, None].expand(-1, options.objects)
    batch = SimpleNamespace(
        flat_img_batch=images, masks=masks.transpose(0, 1), num_frames=options.frames, flat_obj_to_img_idx=frames
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision_of(options):
            loss = criterion(model(batch), batch.masks)["core_loss"]
        loss.backward()
        optimizer.step()

    return step


def precision_of(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)


def clip_of(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (T, 3, S, S) of noise, and (N, T, S, S) bool squares that move through them."""
    side = options.size
    images = torch.randn(options.frames, 3, side, side, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(options.objects, options.frames, side, side, dtype=torch.bool)
    for number in range(options.objects):
        for t in range(options.frames):
            top, left = side // 8 + 4 * t, side // 8 + number * side // (2 * options.objects)
            masks[number, t, top : top + side // 3, left : left + side // 3] = True
    return images, masks


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
    parser.add_argument("--variant", default="tiny", choices=list(TRUNKS))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--objects", type=int, default=2)
    parser.add_argument("--clicks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="under autocast, as the official configurations train")
    parser.add_argument("--official", default="", help="a clone of facebookresearch/sam2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
