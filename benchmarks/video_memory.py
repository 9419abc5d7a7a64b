"""Whether the memory that SAM 2 takes to follow objects grows with the length of a video.

    python benchmarks/video_memory.py --frames 100 2000 --size 64

Videos of moving shapes are drawn, and inference.py's whole way, from the file to masks, overlay and results, is run on
each in a process of its own, whose peak memory is printed. Two objects are prompted in the middle frame, so half of the
video is followed backwards. The weights are random: the work is that of trained ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDES = (96, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--size", type=int, default=64, help="of the model's input")
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for count in options.frames:
        with context.Pool(1) as pool:
            seconds, peak = pool.apply(follow, (count, options.size, options.variant, options.threads))
        print(f"{count:>8} frames: {seconds:.0f} s, peak memory {peak:.0f} MB", flush=True)


def follow(count: int, size: int, variant: str, threads: int) -> tuple[float, float]:
    """(seconds, MB at the peak) of this process."""
    import torch

    from clip_files import VideoClip
    from clip_inference import Follower, Outputs, fit_all, follow_all
    from models import create_model
    from prompting import read_prompts
    from utils import choose_precision
    from writers import JsonList

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = create_model("sam2", variant=variant).eval()
    follower = Follower(model, size=(size, size), device=cpu, precision=choose_precision("no", cpu))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        draw_video(path, count)
        clips = [VideoClip("video", str(path))]
        prompts = fit_all(clips, read_prompts(points=["64,48", "2:20,20"], frame=count // 2))
        began = time.perf_counter()
        with JsonList(Path(folder, "results.json")) as records:
            faults = follow_all(follower, clips, prompts, Outputs(Path(folder), ["overlays"], records))
        seconds = time.perf_counter() - began
        written = len(os.listdir(Path(folder, "masks/video")))
        if faults or written != count:
            raise RuntimeError(f"{written} of {count} frames were written: {faults}")
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw_video(path: Path, count: int) -> None:
    """A circle and a square that move."""
    import cv2
    import numpy as np

    from writers import VideoWriter

    with VideoWriter(path, 25, SIDES) as video:
        for number in range(count):
            frame = np.full((*SIDES, 3), (60, 90, 60), np.uint8)
            angle = number / 20
            cv2.circle(frame, (int(64 + 30 * np.cos(angle)), int(48 + 20 * np.sin(angle))), 12, (220, 60, 40), -1)
            left = number % 90
            cv2.rectangle(frame, (left, 10), (left + 20, 30), (40, 80, 230), -1)
            video.append(frame)


if __name__ == "__main__":
    main()
