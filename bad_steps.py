"""A step whose loss or gradient was not finite, in a file of its own, and the same step again.

    python train.py --replay runs/X/bad_step_123.pth

The file holds all that the step was made of on its rank: weights, batches as they went into the model, what the loss
averages over, seeds and the scale. So neither the data nor the run are needed to look into it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import CheckpointError
from config import take_values
from errors import UserError
from models import create_criterion, create_model
from run import Run
from samples import Batch, SampleInfo
from tasks import get_task
from utils import choose_precision, drop_path_rate, freeze_norm_statistics, pick_device, seed_everything

KEPT = 3  # files of a rank, the newest


# ---------------------------------------------------------------- into a file


def dump(run: Run, meta: dict[str, Any], loss_settings: Mapping[str, Any], phase: dict[str, float]) -> Path:
    """Write the run's last step, which was undone; returns the file.

    The weights are still those of the step. Only the statistics of batch norm have gone on, and in training mode
    nothing depends on them.
    """
    step, rank, taken = run.state.step, run.world.rank, run.last_step
    assert taken is not None
    name = f"bad_step_{step}" + (f"_rank_{rank}" if run.world.size > 1 else "")
    path = run.folder.path / f"{name}.pth"
    checkpoint.save(path, {
        "format": 1,
        "meta": meta,
        "loss": dict(loss_settings),
        "phase": phase,
        "drop_path": drop_path_rate(run.raw_model),
        "scale": run.scaler.get_scale(),
        "step": step,
        "rank": rank,
        "model": run.raw_model.state_dict(),
        "batches": [plain(batch) for batch in taken.batches],
        "counts": taken.counts,
        "values": dict(zip(taken.names, taken.values.tolist(), strict=True)),
    })  # fmt: skip
    drop_older(run.folder.path, rank if run.world.size > 1 else None)
    return path


def drop_older(folder: Path, rank: int | None) -> None:
    """Keep the newest files of a rank: the first of many bad steps says as much as all."""
    pattern = re.compile(r"bad_step_(\d+)" + (f"_rank_{rank}" if rank is not None else "") + r"\.pth")
    found = sorted((int(match[1]), file) for file in folder.iterdir() if (match := pattern.fullmatch(file.name)))
    for _, file in found[:-KEPT]:
        file.unlink()


def plain(batch: Batch) -> dict[str, Any]:
    """A batch as dicts, lists, numbers and tensors."""
    target = batch.targets
    kept = {each.name: getattr(target, each.name) for each in fields(target) if "original" not in each.name}
    return {
        "images": batch.images,
        "targets": kept,
        "samples": [asdict(sample) for sample in batch.samples],
    }


def batch_of(content: dict[str, Any], kind: Callable[..., Any]) -> Batch:
    """The batch that `plain` was given, with targets of a `kind`."""
    return Batch(content["images"], kind(**content["targets"]), [SampleInfo(**info) for info in content["samples"]])


def targets_of(task: str) -> Callable[..., Any]:
    """The class of a task's targets: what its batches are collated to."""
    return get_type_hints(get_task(task).collate_targets)["return"]


# ---------------------------------------------------------------- and again


@dataclass
class Replayed:
    """What a step came to. `values` are sums over its micro-batches; names are those of modules and parameters."""

    then: dict[str, float]
    values: dict[str, float] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    first_output: str = ""  # the first module whose output was not finite
    gradients: list[str] = field(default_factory=list)  # that were not finite
    parameters: int = 0


def replay(path: Path, device: str = "auto") -> Replayed:
    """Take the step of a file again, with nothing changed afterwards. Raises `CheckpointError` for another file."""
    content = checkpoint.load(path)
    if "batches" not in content:
        raise CheckpointError(f"{path} holds no bad step: runs write theirs as bad_step_N.pth")
    meta, place = content["meta"], pick_device(device)
    config = meta["config"]
    model = create_model(meta["family"], **meta["settings"])
    model.load_state_dict(content["model"])
    if config["optimizer"]["freeze"]:
        model.freeze(config["optimizer"]["freeze"])
    model.to(place).train()
    model.set_drop_path(content["drop_path"])
    if config["train"]["freeze_bn"]:
        freeze_norm_statistics(model)
    criterion = create_criterion(meta["family"], meta["task"], **content["loss"]).to(place)
    criterion.set_phase(content["phase"])
    precision = choose_precision(config["train"]["mixed_precision"], place)
    counts = {name: count.to(place) for name, count in content["counts"].items()}
    result = Replayed(content["values"])
    watch_outputs(model, result)
    sums: list[Tensor] = []
    names: list[str] = []
    for micro_step, stored in enumerate(content["batches"]):
        batch = batch_of(stored, targets_of(meta["task"])).to(place)
        seed_everything(config["seed"], content["step"] - 1, micro_step, content["rank"])
        with precision.autocast():
            outputs = model(batch)
        losses = criterion(outputs, batch, counts)
        loss = torch.stack(list(losses.values())).sum()
        (loss * content["scale"]).backward()
        names = ["loss", *(f"loss/{term}" for term in losses)]
        sums.append(torch.stack([loss, *losses.values()]).detach().float())
        result.samples += [sample.sample_id for sample in batch.samples]
    result.values = dict(zip(names, torch.stack(sums).sum(0).tolist(), strict=True))
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result.parameters = len(trained)
    result.gradients = [name for name, gradient in trained.items() if not torch.isfinite(gradient).all()]
    return result


def watch_outputs(model: nn.Module, result: Replayed) -> None:
    """Let `result` name the first module with an output that is not finite."""

    def look(name: str, output: Any) -> None:
        if not result.first_output and isinstance(output, Tensor) and not torch.isfinite(output).all():
            result.first_output = name

    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name or "the model", output))


def told(result: Replayed) -> str:
    """What a person wants to know of a replayed step."""
    lines = [f"samples: {', '.join(result.samples)}"]
    lines += [f"{name}: {value:.6g} (then {result.then[name]:.6g})" for name, value in result.values.items()]
    lines.append(f"first output that is not finite: {result.first_output or 'none'}")
    bad = result.gradients
    names = f": {', '.join(bad[:8])}{' …' if len(bad) > 8 else ''}" if bad else ""
    lines.append(f"gradients that are not finite: {len(bad)} of {result.parameters}{names}")
    return "\n".join(lines)


def replay_command(arguments: list[str], targets: list[str]) -> None:
    """`--replay FILE [--device D]`: print what the step of a file comes to."""
    devices, rest = take_values(arguments, "device")
    if len(targets) != 1 or rest:
        raise UserError("usage: python train.py --replay runs/X/bad_step_N.pth [--device cpu]")
    print(told(replay(Path(targets[0]), devices[0] if devices else "auto")))
