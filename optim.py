"""Optimizers by name and the course of the learning rate.

Apart from the loop, which only asks for `build_optimizer` and `Schedule.set`, so that train.py reads in one go.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import torch
from torch import Tensor

from errors import UserError, nearest
from utils import is_better

TORCH_OPTIMIZERS = ("adamw", "adam", "sgd")


def build_optimizer(
    groups: list[dict[str, Any]], *, name: str, lr: float, weight_decay: float, betas: list[float], momentum: float
) -> torch.optim.Optimizer:
    """An optimizer over parameter groups (see `Model.parameter_groups`).

    AdamW, Adam and SGD are torch's fused ones; `ranger` is RAdam with Lookahead; other names are timm's. Raises
    `UserError` for an unknown name.
    """
    name = name.lower()
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        if momentum:  # torch would take uninitialised memory for the buffer if the very first step were skipped
            for parameter in [p for group in sgd.param_groups for p in group["params"]]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    import timm.optim

    timm_name = {"ranger": "lookahead_radam"}.get(name, name)
    known = [str(each) for each in timm.optim.list_optimizers()]
    if timm_name.removeprefix("lookahead_") not in known:
        raise UserError(f"optimizer.name is {name!r}, which is unknown{nearest(name, [*TORCH_OPTIMIZERS, *known])}")
    about = timm.optim.get_optimizer_info(timm_name.removeprefix("lookahead_"))
    options: dict[str, Any] = {"betas": (betas[0], betas[1])} if about.has_betas and about.num_betas == 2 else {}
    if about.has_momentum:
        options["momentum"] = momentum
    return timm.optim.create_optimizer_v2(groups, opt=timm_name, lr=lr, weight_decay=weight_decay, **options)


def guarded_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Step unless `bad` (0-dim, 0 or 1) is set.

    Fused optimizers skip on the device; the others have no such switch, so the host must look: one synchronisation
    a step on CUDA.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(bad):
        optimizer.step()


class Schedule:
    """The learning rate as a function of the number of applied steps; only plateau remembers anything."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        name: str,
        total_steps: int,
        steps_per_epoch: int,
        warmup_steps: int = 0,
        min_factor: float = 0.0,
        power: float = 0.9,
        epochs: list[float] | None = None,
        gamma: float = 0.1,
        patience: int = 3,
    ) -> None:
        self.optimizer, self.name = optimizer, name
        self.total_steps, self.steps_per_epoch, self.warmup_steps = total_steps, steps_per_epoch, warmup_steps
        self.min_factor, self.power, self.gamma, self.patience = min_factor, power, gamma, patience
        self.milestones = sorted(epochs or [30])
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.plateau: dict[str, Any] = {"factor": 1.0, "best": None, "waited": 0}

    def factor(self, step: int) -> float:
        """The factor of the peak rate for the step after `step` applied ones."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        epoch = step / max(1, self.steps_per_epoch)
        raw = {
            "constant": lambda: 1.0,
            "poly": lambda: (1 - progress) ** self.power,
            "cosine": lambda: (1 + math.cos(math.pi * progress)) / 2,
            "step": lambda: self.gamma ** math.floor(epoch / self.milestones[0]),
            "multistep": lambda: self.gamma ** bisect.bisect_right(self.milestones, epoch),
            "exponential": lambda: self.gamma**epoch,
            "plateau": lambda: float(self.plateau["factor"]),
        }[self.name]()
        return self.min_factor + (1 - self.min_factor) * raw

    def set(self, step: int) -> None:
        """Write the rate into the optimizer's groups."""
        factor = self.factor(step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def on_validation(self, value: float, higher_is_better: bool) -> None:
        """Plateau: multiply by gamma after `patience` validations without improvement."""
        if is_better(value, self.plateau["best"], higher_is_better):
            self.plateau.update(best=value, waited=0)
        else:
            self.plateau["waited"] += 1
            if self.plateau["waited"] > self.patience:
                self.plateau.update(factor=self.plateau["factor"] * self.gamma, waited=0)

    def state_dict(self) -> dict:
        """What a resume needs."""
        return {"plateau": dict(self.plateau)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        self.plateau = dict(state["plateau"])
