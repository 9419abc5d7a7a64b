"""Seconds and peak memory of one BiRefNet training step on this machine.

    python benchmarks/birefnet_step.py --backbone swin_v1_t --size 256 --batch_size 2 --threads 1

Prints the median over the steps of forward, losses, backward, gradient norm and update, without data loading.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loss import BinaryCriterion
from models import create_model
from utils import gradient_norm

PHASES = ("forward", "losses", "backward", "norm", "update")


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model = create_model("birefnet", backbone=options.backbone).train().to(device).to(memory_format=memory_format)
    model.set_activation_checkpointing(options.activation_checkpointing)
    if options.compile:
        for part in model.compile_parts().values():
            part.compile()
    criterion = BinaryCriterion({"bce": 30.0, "iou": 0.5, "ssim": 10.0, "gradient": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    batch = random_batch(options.batch_size, options.size, device)
    start_memory = peak_memory(device)

    times = []
    for step in range(options.warmup + options.steps):
        phases = timed_step(model, criterion, optimizer, batch, options.bf16)
        if step >= options.warmup:
            times.append(phases)
    total = torch.tensor(times).sum(1).median().item()
    medians = torch.tensor(times).median(0).values.tolist()
    line = " ".join(f"{name} {seconds:.3f}" for name, seconds in zip(PHASES, medians, strict=True))
    print(f"{options.backbone} {options.size}² batch {options.batch_size} threads {torch.get_num_threads()} {device}")
    print(f"step {total:.3f} s ({line}), peak memory {peak_memory(device):.0f} MB, {start_memory:.0f} before training")


def timed_step(
    model: torch.nn.Module,
    criterion: BinaryCriterion,
    optimizer: torch.optim.Optimizer,
    batch: SimpleNamespace,
    bf16: bool,
) -> list[float]:
    """Seconds of each phase."""
    marks = [now(batch.images.device)]
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        outputs = model(batch)
    marks.append(now(batch.images.device))
    loss = torch.stack(list(criterion(outputs, batch, criterion.counts(batch)).values())).sum()
    marks.append(now(batch.images.device))
    loss.backward()
    marks.append(now(batch.images.device))
    gradient_norm(model.parameters())
    marks.append(now(batch.images.device))
    optimizer.step()
    optimizer.zero_grad()
    marks.append(now(batch.images.device))
    return [end - start for start, end in pairwise(marks)]


def random_batch(size: int, side: int, device: torch.device) -> SimpleNamespace:
    images = torch.randn(size, 3, side, side, device=device)
    masks = (torch.rand(size, 1, side, side, device=device) > 0.5).float()
    class_ids = torch.full((size,), -1, device=device)
    return SimpleNamespace(images=images, targets=SimpleNamespace(masks=masks, class_ids=class_ids))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Megabytes: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="swin_v1_t")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
