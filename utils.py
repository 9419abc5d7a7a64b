"""Ranks, precision, seeds, meters, the gradient norm and averaged weights: what has no better home."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import Tensor, nn

from errors import UserError

# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls) -> World:
        """The one process of a command that needs neither ranks nor a device."""
        return cls(0, 0, 1, torch.device("cpu"))

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """Rank 0's `value` (plain data), on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered


def join_world(device: str = "auto", timeout_minutes: float = 30) -> World:
    """Read the launcher's variables (torchrun's and accelerate's are the same) and open the process group.

    NCCL on CUDA, Gloo otherwise. Raises `UserError` when the named device is not there.
    """
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        limit = timedelta(minutes=timeout_minutes)
        if restarts() == "0":
            dist.init_process_group(backend, timeout=limit)
        else:  # the launcher's store still holds the addresses of the processes that failed
            store = launcher_store(f"attempt_{restarts()}", limit)
            dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    return World(rank, local_rank, size, chosen)


def restarts() -> str:
    """How often torchrun (`--max_restarts`) started these processes in place of some that had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def may_restart() -> bool:
    """Whether torchrun started this process, which may start it again."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ


def launcher_store(prefix: str, timeout: timedelta) -> dist.Store:
    """The launcher's common memory, under a prefix of its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(prefix, dist.TCPStore(host, port, is_master=False, timeout=timeout))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; raises `UserError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there: {torch.cuda.device_count()} CUDA devices found; try --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there; try --device cpu")
    return device


def environment(world: World | None = None) -> dict[str, str]:
    """What this runs on, by name, to paste into a report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torchvision

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed under this name"

    found = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,  # with the index it came from, which must be that of torchvision
        "torchvision": torchvision.__version__,
        **{name: installed(name) for name in ("timm", "albumentations", "opencv-python-headless", "numpy")},
        "CUDA devices": str(torch.cuda.device_count()),
        "MPS": str(torch.backends.mps.is_available()),
        "cores": str(os.cpu_count()),
    }
    if world is None:
        return found
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
    return {**found, "processes": str(world.size), "device": device}


def peak_memory(world: World) -> str:
    """The most memory held so far: of the device's allocator, or of the process."""
    if world.device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the device"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory {peak / 2**30:.2f} GiB of the process"


def loading_workers(asked: int, world_size: int = 1) -> int:
    """How many loading processes a rank starts; −1 asks for its share of the cores, at most 8."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return asked if asked >= 0 else min(8, (os.cpu_count() or 1) // here)


def leave_world() -> None:
    """Close the process group, if one is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sync_buffers(model: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0 (batch-norm statistics), so that all ranks evaluate one model."""
    if world.size == 1:
        return
    for group in (
        [b for b in model.buffers() if b.is_floating_point()],
        [b for b in model.buffers() if not b.is_floating_point()],
    ):
        if group:
            flat = torch.cat([buffer.detach().reshape(-1).to(group[0].dtype) for buffer in group])
            dist.broadcast(flat, src=0)
            for buffer, value in zip(group, flat.split([b.numel() for b in group]), strict=True):
                buffer.copy_(value.view_as(buffer))


def norm_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers that a forward pass writes: a bad batch must not leave its trace in them."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]


def freeze_norm_statistics(model: nn.Module) -> None:
    """Let batch norm use the statistics that it has, and leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def drop_path_rate(model: nn.Module) -> float:
    """The rate of stochastic depth that a model stands at: that of its deepest block."""
    return max((module.drop_prob for module in model.modules() if isinstance(module, DropPath)), default=0.0)


# ---------------------------------------------------------------- who failed


class RollCall:
    """Ranks tell each other why they end, through the launcher's store, so that the guilty one is named.

    Where a rank fails, the others only see a broken connection, and where one hangs, a time limit.
    """

    patience = 4.0  # seconds for the others to say why they end

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self.blame = ""
        limit = timedelta(seconds=self.patience)
        self.store: Any = launcher_store(f"roll_call_{restarts()}", limit) if world.size > 1 else None

    def end(self, error: BaseException, reason: str) -> str:
        """Say why this rank ends; returns which other rank is to blame, as a sentence, or nothing."""
        if self.store is None:
            return ""
        self.blame = "rank 0, where the ranks meet, no longer answers"
        # A thread, because a question to a store whose process was stopped has no time limit.
        asking = threading.Thread(target=self._ask, args=(reason, is_broken_connection(error)), daemon=True)
        asking.start()
        asking.join(2 * self.patience)
        return self.blame

    def _ask(self, reason: str, is_late: bool) -> None:
        try:
            if self.store.add("ended", 1) == 1:
                self.store.set("first", f"{self.rank} failed first: {reason}")
            self.store.set(f"rank_{self.rank}", reason)
            silent = self._silent() if is_late else []
            first = self.store.get("first").decode() if is_late else ""
        except (RuntimeError, dist.DistError):  # its process is gone
            return
        if silent:
            self.blame = f"rank {' and '.join(map(str, silent))} no longer answers: killed, stopped, or stuck"
        else:
            self.blame = "" if not is_late or first.startswith(f"{self.rank} ") else f"rank {first}"

    def _silent(self) -> list[int]:
        """The ranks that have not said why they end, after a while."""
        end = time.monotonic() + self.patience
        while True:
            silent = [rank for rank in range(self.size) if not self.store.check([f"rank_{rank}"])]
            if not silent or time.monotonic() > end:
                return silent
            time.sleep(0.05)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


# ---------------------------------------------------------------- precision and seeds


@dataclass(frozen=True)
class Precision:
    """The forward pass's number format. `scaler` is needed by fp16 alone."""

    name: str
    device_type: str
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device_type, self.dtype) if self.dtype else nullcontext()

    @property
    def needs_scaler(self) -> bool:
        return self.dtype is torch.float16


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 where a CUDA device supports it, otherwise full precision.

    On a CPU bf16 works but is slower than float32 without AMX, so it is never chosen by itself. Raises `UserError`
    for what the device cannot do.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if name == "fp8":
        raise UserError(
            "train.mixed_precision fp8 needs a GPU with fp8 tensor cores and is not available here; use bf16"
        )
    return Precision(name, device.type, {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[name])


def seed_everything(*numbers: int) -> None:
    """Seed torch, NumPy and Python from a tuple of numbers, so that nothing depends on what ran before."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # 4 µs; torch.manual_seed takes 100
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


# ---------------------------------------------------------------- gradients


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm over all gradients, a 0-dim tensor on their device: one fused kernel, no host synchronisation."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class DelayedFlags:
    """Device flags that the host reads one step late, when they have long been computed.

    The optimizer skips a bad step on the device; the host only needs to know before the next schedule position, so
    it never waits for the step that is running.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def put(self, flags: Tensor) -> None:
        """Start copying `flags` to the host."""
        if flags.device.type == "cuda":
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = flags.detach().clone().cpu()

    def take(self) -> list[float] | None:
        """The flags put last, or None when they have been taken."""
        if self._host is None:
            return None
        if self._ready is not None:
            self._ready.synchronize()
        flags, self._host, self._ready = self._host.tolist(), None, None
        return flags


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The differentiable tensors of a model's outputs, however nested."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from tensors_in(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors_in(value)


# ---------------------------------------------------------------- averaged weights


class EMA:
    """Exponential moving average of weights and batch-norm statistics. A skipped step leaves no trace in it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        import copy

        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, good: Tensor) -> None:
        """Move towards `model` by 1 − decay, times `good` (0 or 1, 0-dim)."""
        average, current = self.module.state_dict(), model.state_dict()
        names = [name for name, value in average.items() if value.is_floating_point()]
        change = list(torch._foreach_sub([current[name] for name in names], [average[name] for name in names]))
        torch._foreach_mul_(change, (1 - self.decay) * good)
        torch._foreach_add_([average[name] for name in names], change)
        for name in average.keys() - set(names):
            average[name].copy_(current[name])


# ---------------------------------------------------------------- meters


def is_better(value: float, best: float | None, higher_is_better: bool) -> bool:
    """Whether `value` beats `best`; what is not a number beats nothing and is beaten by everything."""
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or (value > best if higher_is_better else value < best)


@dataclass
class Meter:
    """Running means of named scalars. Values stay on the device until `means` is asked for."""

    names: list[str] = field(default_factory=list)
    table: Tensor | None = None  # (3, K): sums, how many values they are of, last values

    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add one step's values, a (K,) tensor. Non-finite ones do not count, so one bad step spoils no mean."""
        self.names = list(names)
        counts = torch.isfinite(values).to(values)
        new = torch.stack([torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), counts])
        before = torch.zeros_like(new) if self.table is None else self.table[:2].to(new.device)
        self.table = torch.cat([before + new, values[None]])

    def read(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """(epoch means, last values, epoch sums): the one transfer to the host."""
        if self.table is None:
            return {}, {}, {}
        sums, counts, last = self.table
        rows = torch.stack([sums / counts.clamp(min=1), last, sums]).tolist()
        means, latest, totals = (dict(zip(self.names, row, strict=True)) for row in rows)
        return means, latest, totals

    def state(self) -> dict:
        """Plain values for a checkpoint."""
        return {"names": self.names, "table": None if self.table is None else self.table.tolist()}

    @classmethod
    def restore(cls, state: dict) -> Meter:
        """The meter that `state` was taken from."""
        table = None if state["table"] is None else torch.tensor(state["table"], dtype=torch.float32)
        return cls(names=list(state["names"]), table=table)


# ---------------------------------------------------------------- signals


class StopSignal:
    """SIGTERM and SIGUSR1 ask for a save and an orderly end; the loop polls, the handler does nothing else.

    So does the end of torchrun: without it ranks would train on, but nobody could stop them or start them again.
    """

    def __init__(self) -> None:
        self.name = ""
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGUSR1)}

    def restore(self) -> None:
        """Give the signals back to whom they belonged, when a run ends inside a longer program."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self._launcher and os.getppid() != self._launcher:
            self.name = self.name or "the end of torchrun"
        return bool(self.name)
