"""What every model of this project can do: the contract between a family and the programs that use it.

A family subclasses `Model`, writes `forward`, and ends its file with a table from official keys to its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError, nearest

# An ordered list of (official prefix, own prefix): it renames keys in both directions and, read top to bottom,
# gives the order in which the official code saves them. An empty prefix stands for the whole model.
KeyTable = list[tuple[str, str]]

WRAPPER_KEYS = ("state_dict", "model", "model_state_dict", "ema")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass
class LoadReport:
    """What became of an official checkpoint's entries. Names are the official ones.

    `missing` parameters keep their fresh initial values, and so do `reshaped` ones (the checkpoint's shape, then
    the model's). `ignored` entries are known and of no use to this variant; `unexpected` ones are not known at all.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One paragraph: the counts, with the first names of whatever did not fit."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing and freshly initialised ({_first(self.missing)})")
        if self.reshaped:
            shapes = [f"{key}: {_shape(theirs)} for {_shape(ours)}" for key, (theirs, ours) in self.reshaped.items()]
            parts.append(f"{len(shapes)} of another shape and freshly initialised ({_first(shapes)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected and left out ({_first(self.unexpected)})")
        if self.ignored:
            parts.append(f"{len(self.ignored)} ignored, of no use to this variant ({_first(self.ignored)})")
        return "; ".join(parts + self.notes) + "."


class Model(nn.Module):
    """Base of all families.

    `forward(batch)` takes a `Batch` (anything with `.images`) or the image tensor itself, and returns a dict.
    """

    drop_path_shares: list[float]
    stride: int = 1  # height and width of the input must be multiples of it
    encoder: str = ""  # prefix of the names of the pretrained encoder's parameters
    default_size: tuple[int, int] | None = None  # (width, height) of the input that official weights were trained on
    skips_parameters = False  # whether a step may leave out trainable parameters, for reasons of its own
    official_class_names: Sequence[str] = ()  # of official weights of these settings, where they are published

    # --- evaluation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, batch: Any) -> dict[str, Tensor]:
        """The outputs of the evaluation forward pass, floating ones in float32. The model must be in eval mode."""
        if self.training:
            raise RuntimeError("predict() needs the model in evaluation mode: call model.eval() first")
        return {name: value.float() if value.is_floating_point() else value for name, value in self(batch).items()}

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """{graph: (module with tensors in and out, example inputs, {tensor: {axis: name of an axis of any length}})}.

        Every tensor is named, inputs first, both in the module's order. What is called `images` is given pictures;
        axes called `height` and `width` are multiples of the stride. In the example an axis of any length is 2 or
        more long, for what is 1 is taken to be 1 always.
        """
        raise NotImplementedError

    def compile_parts(self) -> dict[str, nn.Module]:
        """The modules to compile in place (`module.compile()`), by name."""
        return dict(self.named_children())

    # --- training ---------------------------------------------------------------------------------------------

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to this parameter: not to biases, norms, scales, position tables, tokens."""
        leaf = name.rpartition(".")[2]
        return self.get_parameter(name).ndim > 1 and not leaf.endswith(
            ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token")
        )

    def layer_depth(self, name: str) -> tuple[int, int]:
        """(how many encoder blocks lie below this parameter, how many there are); both equal outside the encoder."""
        return 0, 0

    def lr_scale(self, name: str, backbone_lr_scale: float = 1.0, layer_decay: float = 1.0) -> float:
        """Factor on the learning rate of one parameter: encoders may move slower, their early layers slower still."""
        if not self.encoder or not name.startswith(self.encoder):
            return 1.0
        depth, total = self.layer_depth(name)
        return backbone_lr_scale * layer_decay ** (total - depth)

    def parameter_groups(
        self,
        lr: float,
        weight_decay: float,
        backbone_lr_scale: float = 1.0,
        layer_decay: float = 1.0,
        decay_norms: bool = False,
    ) -> list[dict[str, Any]]:
        """Trainable parameters grouped for an optimizer: dicts of params, lr, weight_decay, lr_scale and name.

        With `decay_norms` and both factors at 1 this is the one group that the official BiRefNet trains with.
        """
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = self.lr_scale(name, backbone_lr_scale, layer_decay)
            decay = weight_decay if decay_norms or self.decays(name) else 0.0
            label = f"lr x{scale:.4g}" + ("" if decay else ", no decay")
            empty = {"params": [], "lr": lr * scale, "weight_decay": decay, "lr_scale": scale, "name": label}
            groups.setdefault((scale, decay), empty)["params"].append(parameter)
        return list(groups.values())

    def freeze(self, patterns: Iterable[str]) -> int:
        """Freeze the parameters whose names match: a prefix (`backbone`), or a pattern (`*.norm?.weight`).

        BatchNorm under a frozen prefix keeps evaluating with its stored statistics. Returns how many parameters
        are newly frozen; raises `UserError` for a pattern that matches nothing.
        """
        count = 0
        for pattern in patterns:
            matched = [(name, p) for name, p in self.named_parameters() if _matches(name, pattern)]
            if not matched:
                known = {name.rsplit(".", depth)[0] for name, _ in self.named_parameters() for depth in range(1, 4)}
                raise UserError(f"optimizer.freeze: no parameter is named {pattern!r}{nearest(pattern, known)}")
            for _, parameter in matched:
                count += parameter.requires_grad
                parameter.requires_grad_(False)
        self.train(self.training)
        return count

    def train(self, mode: bool = True) -> Model:
        """As usual, but normalisation layers whose parameters are all frozen stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not _trainable(module):
                module.eval()
        return self

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth: the deepest block is skipped with probability `rate`, the others linearly less.

        May be called at any time; the share of every block is the one that the model was built with.
        """
        paths = [module for module in self.modules() if isinstance(module, DropPath)]
        if not hasattr(self, "drop_path_shares"):
            deepest = max((path.drop_prob for path in paths), default=0.0)
            self.drop_path_shares = [path.drop_prob / deepest for path in paths]
        for path, share in zip(paths, self.drop_path_shares, strict=True):
            path.drop_prob = rate * share

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each block in the backward pass: less memory, about a third more time."""
        module: Any
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = enabled
            elif hasattr(module, "set_grad_checkpointing"):  # timm's networks
                module.set_grad_checkpointing(enabled)

    # --- published weights ---------------------------------------------------------------------------------------

    def published_weights(self) -> dict[str, str]:
        """Where the `backbone` and `official` weights for this model's settings are published, of those that are."""
        return {}

    # --- official checkpoints ---------------------------------------------------------------------------------

    def official_keys(self) -> KeyTable:
        """The table between official keys and this model's."""
        return [("", "")]

    def official_part(self, key: str, tensor: Tensor) -> Tensor:
        """The part, as a view, of one of this model's tensors that an official key names; nearly all name a whole."""
        return tensor

    def ignores(self, key: str) -> bool:
        """Whether an official key that this variant has no place for is known to be of no use to it."""
        return False

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that build the model of a checkpoint in the official layout. `UserError` where the weights are
        of another family, or, as here, do not tell."""
        raise UserError("these weights do not say which network they belong to: name it in the settings of the model")

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load weights in the official layout, wrapped or bare, in any floating-point type.

        Nothing raises on a mismatch: the report says what was loaded and what was not. Buffers of whole numbers
        (counters, index tables) are derived, so they are not missed.
        """
        return self.load_tensors(unwrap(state_dict), self.official_keys())

    def load_tensors(self, theirs: Mapping[str, Tensor], table: KeyTable) -> LoadReport:
        """Load bare tensors whose names the table translates; for families that are published in several layouts."""
        ours = self.state_dict()
        report = LoadReport()
        for official, name in key_pairs(ours, table).items():
            tensor, own = theirs.get(official), self.official_part(official, ours[name])
            if tensor is None:
                if own.is_floating_point():
                    report.missing.append(official)
            elif tensor.shape != own.shape:
                report.reshaped[official] = (tuple(tensor.shape), tuple(own.shape))
            else:
                own.copy_(tensor)
                report.loaded.append(official)
        known = {*report.loaded, *report.reshaped}
        for key in theirs:
            if key not in known:
                (report.ignored if self.ignores(key) else report.unexpected).append(key)
        return report

    def official_state_dict(self) -> dict[str, Tensor]:
        """This model's weights under the official keys, in the official order."""
        return self.save_tensors(self.official_keys())

    def save_tensors(self, table: KeyTable) -> dict[str, Tensor]:
        """The weights under the names that the table gives them, in its order."""
        ours = self.state_dict()
        return {key: self.official_part(key, ours[name]) for key, name in key_pairs(ours, table).items()}


class Logits(nn.Module):
    """The final logits as a bare tensor, for graphs that hold no dicts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["logits"]


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bare tensors of a checkpoint: out of its wrapper, without the prefixes that DDP and compile leave."""
    for key in WRAPPER_KEYS:
        if isinstance(state_dict.get(key), Mapping):
            return unwrap(state_dict[key])
    tensors = {_strip(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"the checkpoint holds no weights: its entries are {_first(list(state_dict)) or 'none at all'}")
    return tensors


def key_pairs(names: Iterable[str], table: KeyTable) -> dict[str, str]:
    """{official key: own key} of every own name, in the table's order."""
    names = list(names)
    return {
        (official + name[len(own) :]).removeprefix("."): name
        for official, own in table
        for name in names
        if own == "" or name == own or name.startswith(own + ".")
    }


def checkpointed(module: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a module and recompute it in backward, without counting its batch twice in BatchNorm's statistics."""
    if torch.compiler.is_compiling():  # the compiler never repeats the update of a buffer
        return checkpoint(module, *inputs, use_reentrant=False)

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), _statistics_untouched(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which nothing is cast on the tensor's device; on "meta", which knows no casting, nothing ever is."""
    kind = tensor.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


@contextlib.contextmanager
def _statistics_untouched(module: Any) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _strip(key: str) -> str:
    while key.startswith(WRAPPER_PREFIXES):
        key = key.removeprefix("module.").removeprefix("_orig_mod.")
    return key


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern.rstrip(".") + ".") or fnmatchcase(name, pattern)


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
