"""What the tests of the loop share: drawn data, a tiny model, and ways to run the real commands.

Importing torch and the rest costs seconds a process, so `Zygote` imports everything once and forks: each child runs
`train.py` as `python train.py …` would, may be killed like any process, and can be one rank of several.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before torch is imported: a user's own config_vars.yml stays out of the tests, and sums have one order.
os.environ["MASKWRIGHT_CONFIG_VARS"] = os.path.join(os.devnull, "absent")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from models import FAMILIES, Family
from settings import FAMILY_SETTINGS, setting

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "evaluate")

SMALL = ["--data.size", "64", "64", "--device", "cpu", "--num_workers", "0", "--logging.progress", "false"]
TINY = [
    "--model.backbone", "pvt_v2_b0", "--model.multi_scale_input", "none", "--model.decoder_attention", "none",
    "--model.squeeze_block", "BasicDecBlk_x1", *SMALL,
]  # fmt: skip
TOY = ["--model.family", "toy", *SMALL]
SEGFORMER = ["--model.family", "segformer", *SMALL]
CLASSIFIER = ["--model.family", "classifier", "--model.backbone", "test_resnet", *SMALL]
SAM2 = ["--model.family", "sam2", "--model.correction_clicks", "1", "--data.clip.frames", "3", *SMALL]
RFDETR = ["--model.family", "rfdetr", "--model.groups", "2", *SMALL, "--data.size", "96", "96"]


@dataclass
class ToySettings:
    """A fifth family, added as any other would be: a model, its settings, a row each."""

    family: Literal["toy"] = setting("toy", "the model family")
    pretrained: str = setting("none", "none, or a weights file to start from", path="file")
    width: int = setting(64, "channels", min=1)
    dropout: float = setting(0.3, "dropout", min=0, max=1)
    drop_path: float = setting(0.3, "stochastic depth", min=0, max=1)


def add_toy_family() -> None:
    """Make `--model.family toy` known to this process."""
    FAMILY_SETTINGS["toy"] = ToySettings
    FAMILIES["toy"] = Family("tests.toy.Toy", {"binary": "loss.BinaryCriterion"})


def draw_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A data set of bright ellipses on dark noise, 64 to 96 pixels wide, with one soft mask among them."""
    generator = np.random.default_rng(seed)
    for kind in ("im", "gt"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        height, width = (int(side) for side in generator.integers(64, 97, 2))
        y, x = np.mgrid[:height, :width]
        center_y, center_x = generator.uniform(0.35, 0.65, 2) * (height, width)
        radius_y, radius_x = generator.uniform(0.15, 0.35, 2) * (height, width)
        distance = ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2
        alpha = np.clip((1.2 - distance) / 0.4, 0, 1) if number == 0 else (distance < 1).astype(float)
        ground = generator.uniform(0, 90, (height, width, 3))
        image = ground * (1 - alpha[..., None]) + generator.uniform(120, 255, 3) * alpha[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "im" / f"{number:02d}.png")
        Image.fromarray((alpha * 255).astype(np.uint8)).save(folder / "gt" / f"{number:02d}.png")
    return folder


def draw_label_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A data set of three classes, 80x96: a bright disc and a dark bar on grey noise, the disc's rim ignored."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:80, :96]
    for number in range(count):
        labels = np.zeros((80, 96), np.uint8)
        distance = np.hypot(y - generator.uniform(25, 55), x - generator.uniform(25, 70))
        labels[distance < 21] = 255
        labels[distance < 18] = 1
        top = int(generator.integers(0, 70))
        labels[top : top + 8][labels[top : top + 8] == 0] = 2
        colors = np.array([[110, 110, 110], [240, 210, 60], [20, 30, 90]])[np.where(labels == 255, 0, labels)]
        image = np.clip(colors + generator.normal(0, 12, colors.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{number:02d}.png")
    (folder / "classes.txt").write_text("ground\ndisc\nbar")
    return folder


def draw_object_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A data set of two classes in YOLO's layout, 80x96: none to three bright discs and dark bars on grey noise."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    corners = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    y, x = np.mgrid[:80, :96]
    for number in range(count):
        image = np.full((80, 96, 3), 110.0)
        lines = []
        for place in generator.permutation(3)[: number % 4]:
            center = generator.uniform(22, 58), 18 + 30 * place + generator.uniform(-4, 4)
            if generator.random() < 0.5:
                image[np.hypot(y - center[0], x - center[1]) < 11] = (240, 210, 60)
                outline = np.stack([center[1] + 11 * np.cos(corners), center[0] + 11 * np.sin(corners)], 1)
            else:
                image[(abs(y - center[0]) < 6) & (abs(x - center[1]) < 12)] = (20, 30, 90)
                outline = np.array([[-12, -6], [12, -6], [12, 6], [-12, 6]]) + center[::-1]
            shares = (outline + 0.5).clip(0, (96, 80)) / (96, 80)
            lines.append(f"{int(len(outline) == 4)} " + " ".join(f"{value:.5f}" for value in shares.ravel()))
        image += generator.normal(0, 12, image.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        (folder / "labels" / f"{number:02d}.txt").write_text("\n".join(lines))
    (folder / "images" / "classes.txt").write_text("disc\nbar")
    return folder


def tiny_rfdetr() -> Any:
    """A size of RF-DETR of some 0.2 million parameters, to stand for one of the table's."""
    import timm
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    from models.rfdetr.variants import Variant

    def vit_tiny_patch14_dinov2(pretrained: bool = False, **settings: Any) -> VisionTransformer:
        ignored = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        settings = {name: value for name, value in settings.items() if name not in ignored}
        return VisionTransformer(embed_dim=48, depth=4, num_heads=2, **settings)

    if not timm.is_model("vit_tiny_patch14_dinov2"):
        vit_tiny_patch14_dinov2.__module__ = VisionTransformer.__module__
        register_model(vit_tiny_patch14_dinov2)
    return Variant(
        12, 1, 8, 2, 12, "", taps=(0, 1, 2, 3), global_blocks=(1,), encoder="tiny", width=48, self_heads=2,
        cross_heads=4,
    )  # fmt: skip


def tiny_sam2() -> Any:
    """A size of SAM 2 whose image encoder has some 0.2 million parameters, to stand for one of the table's."""
    import timm
    from timm.models import register_model
    from timm.models.hieradet_sam2 import HieraDet, _create_hiera_det

    from models.sam2.image_encoder import Trunk

    def sam2_hiera_mini(pretrained: bool = False, **settings: Any) -> HieraDet:
        settings = {name: value for name, value in settings.items() if not name.startswith("pretrained_cfg")}
        size: dict[str, Any] = {"embed_dim": 16, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)}
        return _create_hiera_det("sam2_hiera_tiny", pretrained=pretrained, **size, **settings)

    if not timm.is_model("sam2_hiera_mini"):
        sam2_hiera_mini.__module__ = HieraDet.__module__
        register_model(sam2_hiera_mini)
    return Trunk("sam2_hiera_mini", 16, 6)


def shrink_sam2(patch: pytest.MonkeyPatch) -> None:
    """Make SAM 2 of the size tiny small: a third of its parameters are in MLPs that are eight times as wide as all."""
    from models.sam2 import image_encoder, mask_decoder, memory_attention

    patch.setitem(image_encoder.TRUNKS, "tiny", tiny_sam2())
    for module in (mask_decoder, memory_attention):
        patch.setattr(module, "MLP_WIDTH", 64)


def draw_clip_set(folder: Path, count: int, frames: int = 4, seed: int = 0) -> Path:
    """Clips in the layout of DAVIS, 64x80: a bright disc, and in every second clip a dark bar, move on noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :80]
    for number in range(count):
        places = [folder / kind / f"clip{number}" for kind in ("JPEGImages", "Annotations")]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        center, pace = generator.uniform(20, 44, 2), generator.uniform(-4, 4, 2)
        for t in range(frames):
            labels = np.zeros((64, 80), np.uint8)
            if number % 2:
                labels[50 - 2 * t : 58 - 2 * t, 50:74] = 2
            labels[np.hypot(y - center[0] - pace[0] * t, x - center[1] - pace[1] * t) < 12] = 1
            colors = np.array([[110, 110, 110], [240, 210, 60], [20, 30, 90]])[labels]
            image = (colors + generator.normal(0, 12, colors.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(places[0] / f"{t:05d}.png")
            Image.fromarray(labels).save(places[1] / f"{t:05d}.png")
    return folder


def draw_class_set(folder: Path, count: int, seed: int = 0) -> Path:
    """A data set of three classes, so many pictures of each, 72x80: a bright disc, ring or bar on dark noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:72, :80]
    for name in ("bar", "disc", "ring"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            top, left = generator.uniform(28, 44), generator.uniform(28, 52)
            distance = np.hypot(y - top, x - left)
            inside = {"bar": abs(y - top) < 8, "disc": distance < 20, "ring": abs(distance - 18) < 5}[name]
            image = generator.uniform(0, 90, (72, 80, 3)) + 150 * inside[..., None]
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def flags_for(data: Path, runs: Path, name: str, *more: str, model: list[str] = TINY) -> list[str]:
    """The command line of a tiny run on `data/train` and `data/val`."""
    return [
        *model, "--data.train", str(data / "train"), "--data.val", str(data / "val"),
        "--output_dir", str(runs), "--experiment_name", name, *more,
    ]  # fmt: skip


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python <name>.py arguments`, run in this process through its own entry."""
    import importlib

    from errors import run_command

    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(module.command)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def in_process(*arguments: str, callbacks: list[Any] | None = None) -> dict[str, float]:
    """`train.main` on a command line, in this process."""
    import config
    import train

    return train.main(config.load(list(arguments)), callbacks)


def python(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real `python …` in the repository root."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run, without the fields that time decides."""
    from tracking import TIMINGS, read_records

    rows = read_records(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def difference(first: Any, second: Any, where: str = "") -> str:
    """Where two nested values stop being equal bit by bit, or nothing. NaN equals itself."""
    import torch

    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        return "" if same and _bits(first) == _bits(second) else where or "the tensors"
    if type(first) is not type(second):
        return f"{where}: {first!r} and {second!r}"
    if isinstance(first, dict):
        if list(first) != list(second):
            return f"{where}: keys {sorted(map(str, set(first) ^ set(second)))} or their order"
        found = (difference(first[key], second[key], f"{where}.{key}") for key in first)
        return next((text for text in found if text), "")
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"{where}: lengths {len(first)} and {len(second)}"
        found = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(first, second, strict=True)))
        return next((text for text in found if text), "")
    same = first == second or (first != first and second != second)
    return "" if same else f"{where}: {first!r} and {second!r}"


def _bits(tensor: Any) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


LASTING = ("model", "ema", "optimizer", "scheduler", "scaler", "state", "rng", "world_size")


def assert_same_run(unbroken: Path, resumed: Path) -> None:
    """Checkpoints, metric records and the csv of two runs agree bit by bit, timings excepted."""
    import csv

    import checkpoint
    from tracking import TIMINGS

    for name in ("last.pth", "best.pth"):
        one, other = checkpoint.load(unbroken / name), checkpoint.load(resumed / name)
        for part in LASTING:
            assert not difference(one[part], other[part], f"{name}: {part}")
    assert records(unbroken) == records(resumed)
    tables = []
    for run in (unbroken, resumed):
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{name: value for name, value in row.items() if name not in TIMINGS} for row in rows])
    assert tables[0] == tables[1]
    epoch_files = [sorted(f.name.removeprefix(run.name) for f in run.glob("*_epoch_*")) for run in (unbroken, resumed)]
    assert epoch_files[0] == epoch_files[1]


# ---------------------------------------------------------------- processes that can be killed


def free_port() -> int:
    """A TCP port that nobody listens on, none of those (Linux: from 32768) that the system gives to all who ask."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


class Job:
    """The ranks of one run, forked from the zygote."""

    def __init__(self, zygote: Zygote, pids: list[int], logs: list[Path]) -> None:
        self.zygote, self.pids, self.logs = zygote, pids, logs

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes of all ranks; -9 is a kill. Ranks that outlive the time are killed, and the test fails."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            codes = self.zygote.ask({"poll": self.pids})["codes"]
            if None not in codes:
                return codes
            time.sleep(0.02)
        self.kill()
        pytest.fail(f"the run did not end in {timeout} s:\n{self.text()[-3000:]}")

    def kill(self, ranks: list[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks, or to all."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def running(self) -> bool:
        return None in self.zygote.ask({"poll": self.pids})["codes"]

    def text(self) -> str:
        """What the ranks have printed, one after the other."""
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in self.logs if log.exists())


class Zygote:
    """A process that has imported the program and computes nothing itself; its forks are the real commands."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.count = scratch, 0
        code = "import tests.helpers as h; h.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, arguments: list[str], world: int = 1, script: str = "train", before: str = "", **environment: str
    ) -> Job:
        """Start `script.py arguments` on `world` ranks; `before` is Python that each rank runs first."""
        self.count += 1
        # Each writes a file of its own: not every system adds whole lines to one that several processes share.
        logs = [self.scratch / f"job_{self.count}_{rank}.txt" for rank in range(world)]
        port = str(free_port())
        pids = []
        for rank in range(world):
            launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            request = {"run": script, "arguments": arguments, "log": str(logs[rank]), "before": before,
                       "environment": {**(launched if world > 1 else {}), **environment}}  # fmt: skip
            pids.append(self.ask(request)["pid"])
        return Job(self, pids, logs)

    def run(self, arguments: list[str], world: int = 1, **how: Any) -> Job:
        """Run to the end, which must be a good one."""
        job = self.start(arguments, world, **how)
        codes = job.wait()
        assert codes == [0] * world, job.text()[-4000:]
        return job

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def serve() -> None:
    """The zygote's life: fork what is asked for, tell who has ended."""
    import importlib

    for name in (*SCRIPTS, "loss", "models.birefnet", "models.sam2.model", "matcher", "tests.toy"):
        importlib.import_module(name)
    add_toy_family()
    importlib.import_module("models.rfdetr.variants").SEGMENTATION["nano"] = tiny_rfdetr()
    shrink_sam2(pytest.MonkeyPatch())  # for good
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            for pid in request["poll"]:
                if pid not in ended:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        ended[pid] = os.waitstatus_to_exitcode(status)
            reply: dict[str, Any] = {"codes": [ended.get(pid) for pid in request["poll"]]}
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
            reply = {"pid": pid}
        print(json.dumps(reply), flush=True)
    os._exit(0)  # there is nothing to write, and to take all this down lasts seconds


def _become(request: dict[str, Any]) -> None:
    """The child: the script as `__main__`, its output in a file."""
    code = 0
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    sys.argv = [f"{request['run']}.py", *request["arguments"]]
    try:
        exec(request["before"], {})
        runpy.run_path(str(ROOT / f"{request['run']}.py"), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> bool:
    """Poll until `condition` holds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def record_count(run: Path) -> int:
    """Lines of metrics.jsonl."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def zygote_in(scratch: Path) -> Iterator[Zygote]:
    """A zygote for the duration of a block."""
    zygote = Zygote(scratch)
    try:
        yield zygote
    finally:
        zygote.close()
