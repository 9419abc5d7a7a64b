"""Turn a checkpoint into a file for other programs: `python export.py --checkpoint runs/my_run --format onnx`.

`onnx` writes the model's graphs, for any batch and, where the model allows, any size, and runs each in onnxruntime on
pictures in two shapes beside PyTorch; only where they agree does the file appear. What a program must know to use it
(task, classes, size, mean and deviation of the input) lies in its metadata; docs/export.md reads them and runs it.
`safetensors` and `pth` hold the weights under their official names, for the programs that the family comes from.
"""

from __future__ import annotations

import sys

from config import answer_at_once, parse_options
from errors import UserError, run_command
from settings import ExportSettings

ACTIONS = {"debug": "show the traceback of a user error", "help": "this page"}

if __name__ == "__main__":
    answer_at_once("export.py --checkpoint RUN [--format onnx|safetensors|pth] [options]", ACTIONS, ExportSettings)

import importlib.util
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import load_model, load_weights
from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from demo import draw_pair
from models import create_model
from readers import ImageList, fail_on
from samples import Sample, Size
from transforms import resize

NEEDED = ("onnx", "onnxscript", "onnxruntime")
# Of what PyTorch computes in float32: the largest difference, as a share of the largest value. Sums in another order
# differ by 1e-6 to 1e-5; half precision has eleven bits, of which a network of some depth loses a few.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
# A model that chooses the best of many, as RF-DETR does among proposals, may choose another where two are equal but for
# a rounding. So where outputs differ, PyTorch is asked whether its own do when its inputs are changed by so much of
# their largest value.
ROUNDING = {"fp32": 3e-6, "fp16": 1e-3}
SHAKES = 8  # times that it is asked
TRIALS = 5  # times that other inputs are tried then
DEFAULT_SIZE = [1024, 1024]  # of official weights, which do not say what they were trained on
PREDICTING = ("Conv", "MatMul", "Gemm")  # operators with weights
EXTERNAL = 1.8e9  # bytes of weights from which on they lie beside a graph, since a protobuf ends at 2 GiB


def run(settings: ExportSettings) -> list[Path]:
    """Write what is asked for and return the files; nothing is written where it cannot be, or is not what it should be.

    Raises:
        UserError: of a setting, a missing package, or a graph that computes something else than the model.
    """
    if settings.format == "onnx":
        require(NEEDED)
    model, meta = load_model(Path(settings.checkpoint))
    target = output_path(settings, meta)
    with staging(target.parent) as folder:
        if settings.format == "onnx":
            export_onnx(model, meta, folder / target.name, settings)
        else:
            export_weights(model, meta, folder / target.name, settings)
        names = sorted(file.name for file in folder.iterdir())
    return [target.parent / name for name in names]


def require(packages: Sequence[str]) -> None:
    """Raise `UserError` unless the packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which is not installed: pip install {' '.join(packages)}"
        )


# ---------------------------------------------------------------- where to


def output_path(settings: ExportSettings, meta: Mapping[str, Any]) -> Path:
    """The file asked for, else one named after the run, beside its checkpoints; `UserError` where it cannot be."""
    suffix = f".{settings.format}"
    source = Path(settings.checkpoint)
    folder = source if source.is_dir() else source.parent
    kind = "" if settings.format == "onnx" else "_official"
    target = Path(settings.output) if settings.output else folder / f"{meta['experiment_name']}{kind}{suffix}"
    if target.suffix != suffix:
        raise UserError(f"--output {target} must end in {suffix}, as --format {settings.format} says")
    if target.is_dir() or (target.exists() and target.samefile(source)):
        raise UserError(
            f"--output {target} is {'a folder' if target.is_dir() else 'the checkpoint'}; name another file"
        )
    return target


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder; what lies there in the end moves into `folder`, and after an exception it is gone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as hidden:
            yield Path(hidden)
            # A graph comes after the weights that lie beside it.
            for file in sorted(Path(hidden).iterdir(), key=lambda file: file.suffix == ".onnx"):
                with open(file, "rb") as content:
                    os.fsync(content.fileno())
                os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; name another file with --output") from None


# ---------------------------------------------------------------- weights


def export_weights(model: Any, meta: Mapping[str, Any], file: Path, settings: ExportSettings) -> None:
    """The official layout, as `.safetensors` or `.pth`, read back into a fresh model to be sure of it."""
    tensors = {name: to_precision(tensor, settings.precision) for name, tensor in official_tensors(model, settings)}
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt", **describe(meta, meta.get("size") or DEFAULT_SIZE)})
    else:
        torch.save(tensors, file)
    fresh = create_model(meta["family"], **meta["settings"])
    report = fresh.load_official(load_weights(file))
    if report.missing or report.reshaped or report.unexpected:
        raise RuntimeError(f"the file does not load again: {report.summary()}")
    print(
        f"{file.name}: {len(tensors)} tensors, {megabytes(file)}, {settings.precision}, loaded again into a fresh model"
    )


def official_tensors(model: Any, settings: ExportSettings) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the layout that is asked for, where the family is published in several."""
    options = {"layout": settings.layout} if settings.layout else {}
    if options and "layout" not in signature(model.official_state_dict).parameters:
        raise UserError(f"--layout {settings.layout}: this family's weights have one layout; leave it out")
    yield from model.official_state_dict(**options).items()


def to_precision(tensor: Tensor, precision: str) -> Tensor:
    """A copy of its own, for parts of a tensor lie in one memory; numbers that are no floats stay what they are."""
    is_halved = precision == "fp16" and tensor.is_floating_point()
    return tensor.detach().to(torch.float16 if is_halved else tensor.dtype, copy=True).contiguous()


# ---------------------------------------------------------------- graphs


@dataclass
class Graph:
    """One of a model's graphs, as `Model.export_graphs` describes it."""

    module: nn.Module
    example: tuple[Tensor, ...]
    axes: dict[str, dict[int, str]]

    @property
    def inputs(self) -> list[str]:
        return list(self.axes)[: len(self.example)]

    @property
    def outputs(self) -> list[str]:
        return list(self.axes)[len(self.example) :]

    def example_sizes(self) -> dict[str, int]:
        """How long each axis of any length is in the example."""
        pairs = zip(self.inputs, self.example, strict=True)
        return {axis: each.shape[i] for name, each in pairs for i, axis in self.axes[name].items()}


def export_onnx(model: Any, meta: Mapping[str, Any], target: Path, settings: ExportSettings) -> None:
    """Write and check every graph of a model: `target` itself, or `<target>_<graph>.onnx` where there are several."""
    if hasattr(model, "graph_size"):
        width, height = meta.get("size") or DEFAULT_SIZE
        model.graph_size = (height, width)
    graphs = {name: Graph(*parts) for name, parts in model.export_graphs().items()}
    for name, graph in graphs.items():
        file = target if len(graphs) == 1 else target.with_name(f"{target.stem}_{name}.onnx")
        trials = list(enumerate(trial_sizes(graph, meta, model.stride)))
        draw_inputs(graph, trials[0][1], meta, settings, 0)  # pictures that cannot be read are told before the tracing
        about = describe(meta, fixed_size(graph) or meta.get("size") or DEFAULT_SIZE)
        write_graph(graph, file, about, settings)
        print(f"{file.name}: {megabytes(file)}, {settings.precision}, opset {opset_of(file)}")
        print(f"  {signature_of(graph)}")
        for key, value in about.items():
            print(f"  {key}: {value if len(value) < 100 else value[:100] + ' …'}")
        for number, sizes in trials:
            seeds = range(number, len(trials) * TRIALS, len(trials))
            draws = (draw_inputs(graph, sizes, meta, settings, seed) for seed in seeds)
            if not any(check(graph, file, inputs, settings.precision) for inputs in draws):
                raise UserError(
                    f"{file.name} cannot be compared: the model's own outputs jump when its inputs are rounded as "
                    f"{settings.precision} does, on each of {TRIALS} trials; no file was written. Try other --images"
                    + (", or --precision fp32" if settings.precision == "fp16" else "")
                )


def fixed_size(graph: Graph) -> list[int] | None:
    """[width, height] of the images where a graph takes no others."""
    images = dict(zip(graph.inputs, graph.example, strict=True)).get("images")
    if images is None or {2, 3} & set(graph.axes["images"]):
        return None
    return [images.shape[3], images.shape[2]]


def trial_sizes(graph: Graph, meta: Mapping[str, Any], stride: int) -> list[dict[str, int]]:
    """Two shapes to compare in: one picture as the checkpoint takes it, and one that nothing was traced with.

    The latter has small pictures, a quarter of the example and a stride or two more.
    """
    example = graph.example_sizes()
    width, height = meta.get("size") or DEFAULT_SIZE
    usual = {"batch": 1, "height": height, "width": width}
    strides = {"height": 1, "width": 2}
    further = {
        axis: (size // 4 // stride + strides[axis]) * stride if axis in strides else size + 1
        for axis, size in example.items()
    }
    return [{axis: usual.get(axis, size) for axis, size in example.items()}, further]


def write_graph(graph: Graph, file: Path, about: dict[str, str], settings: ExportSettings) -> None:
    """Trace a graph and write it with its metadata.

    Raises:
        UserError: operators of the graph are newer than the opset that is asked for.
    """
    with quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph.module,
            graph.example,
            dynamo=True,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=tuple(graph.axes[name] for name in graph.inputs),
            opset_version=settings.opset or None,
            verbose=False,
        )
    program.model.metadata_props.update(about)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    program.save(file, external_data=weights > EXTERNAL)
    if settings.precision == "fp16":
        halve(file, external=weights > 2 * EXTERNAL)
    if settings.opset and opset_of(file) != settings.opset:
        raise UserError(f"--opset {settings.opset}: this graph needs opset {opset_of(file)}; leave the option out")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def halve(file: Path, external: bool) -> None:
    """Weights and arithmetic in half precision; inputs and outputs stay float32, and so do a few operators.

    Positions that are sampled at are among them: in a map of 256 pixels half precision would place them to an eighth of
    one. So are products of weights alone, which onnxruntime 1.32 gets wrong on a CPU in half precision (4e-2 instead
    of 4e-4 of BiRefNet's logits, with its last level of optimizations only), and which take no time.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(file)
    kept = [*position_nodes(model.graph), *weight_products(model.graph)]
    with quiet():
        halved = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True, node_block_list=kept)
    join(halved.graph, set(kept))
    beside = file.with_name(f"{file.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(halved, file, save_as_external_data=external, location=beside.name)


def join(graph: Any, kept: set[str]) -> None:
    """Take out the rounding, there and back, that the conversion leaves between two nodes of which both are kept."""
    makers = {name: node for node in graph.node for name in node.output}
    sources = {}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.op_type == "Cast" else None
        if before is not None and before.op_type == "Cast" and before.name not in kept:
            source = makers.get(before.input[0])
            if source is not None and source.name in kept:
                sources[node.output[0]] = before.input[0]
    for node in graph.node:
        if node.name in kept:
            node.input[:] = [sources.get(name, name) for name in node.input]


def position_nodes(graph: Any) -> list[str]:
    """Names of the nodes that sample maps and of those that make positions, back to the layers that predict them."""
    makers = {name: node for node in graph.node for name in node.output}
    samplers = [node for node in graph.node if node.op_type == "GridSample"]
    found = {node.name for node in samplers}
    waiting = [node.input[1] for node in samplers]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.op_type not in PREDICTING and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return sorted(found)


def weight_products(graph: Any) -> list[str]:
    """Names of the matrix products that no input of the graph has a part in."""
    fixed = {"", *(tensor.name for tensor in graph.initializer)}
    found = []
    for node in graph.node:  # in the order of computing
        if fixed.issuperset(node.input):
            fixed.update(node.output)
            if node.op_type in PREDICTING:
                found.append(node.name)
    return found


def opset_of(file: Path) -> int:
    """The version of ONNX's operators that a file is written in."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    return next(entry.version for entry in graph.opset_import if not entry.domain)


# ---------------------------------------------------------------- what a program must know


def describe(meta: Mapping[str, Any], size: Sequence[int]) -> dict[str, str]:
    """Metadata of a file: JSON values by name.

    `size` is [width, height]; pixels are RGB in 0..1, less `mean`, divided by `std`; both are null where each image's
    own over all channels are meant. `resize`: whether pictures are stretched to the size, or padded.
    """
    own = meta.get("normalize") == "image"
    values = {
        "family": meta["family"],
        "task": meta["task"],
        "size": list(size),
        "resize": meta.get("resize", "stretch"),
        "mean": None if own else list(IMAGENET_MEAN),
        "std": None if own else list(IMAGENET_STD),
        "class_names": list(meta.get("class_names") or []),
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def signature_of(graph: Graph) -> str:
    """`images (batch, 3, height, width) -> logits (…)`."""

    def shape(name: str, sides: Sequence[int]) -> str:
        return f"{name} ({', '.join(graph.axes[name].get(i, str(side)) for i, side in enumerate(sides))})"

    inputs = [shape(name, each.shape) for name, each in zip(graph.inputs, graph.example, strict=True)]
    return f"{', '.join(inputs)} -> {', '.join(graph.outputs)}"


def megabytes(file: Path) -> str:
    """What a file and the weights beside it take."""
    return f"{sum(each.stat().st_size for each in file.parent.glob(file.name + '*')) / 1e6:.1f} MB"


# ---------------------------------------------------------------- comparing


def draw_inputs(
    graph: Graph, sizes: Mapping[str, int], meta: Mapping[str, Any], settings: ExportSettings, seed: int
) -> list[Tensor]:
    """Inputs of these sizes: pictures for `images`, the example with noise for all else."""
    random = torch.Generator().manual_seed(seed)
    inputs = []
    for name, example in zip(graph.inputs, graph.example, strict=True):
        shape = [sizes[graph.axes[name][i]] if i in graph.axes[name] else side for i, side in enumerate(example.shape)]
        if name == "images":
            numbers = range(seed * shape[0], (seed + 1) * shape[0])
            pictures = find_pictures(settings.images, numbers, (shape[2], shape[3]), meta.get("resize") == "pad")
            inputs.append(normalize(pictures, meta.get("normalize", "imagenet")))
        else:
            repeats = [math.ceil(side / there) for side, there in zip(shape, example.shape, strict=True)]
            repeated = example.repeat(repeats)[tuple(slice(side) for side in shape)]
            noise = torch.randn(shape, generator=random) if example.is_floating_point() else 0
            inputs.append(repeated + noise)
    return inputs


def find_pictures(paths: Sequence[str], numbers: Sequence[int], size: Size, pad: bool) -> np.ndarray:
    """(count, *size, 3) uint8: pictures by number of these files and folders, over again if need be, or drawn ones."""
    if paths:
        images = ImageList(paths)
        fail_on(images.faults)
        if not len(images):
            raise UserError(f"--images {' '.join(paths)}: holds no images to compare on")
        pictures = [images.read(number % len(images)).frames[0] for number in numbers]
    else:
        pictures = [draw_pair(np.random.default_rng(number))[0] for number in numbers]
    return np.stack([resize(Sample([picture]), size, pad=pad).frames[0] for picture in pictures])


def check(graph: Graph, file: Path, inputs: Sequence[Tensor], precision: str) -> bool:
    """Run a graph in onnxruntime and the module in PyTorch, and print how far apart they are and how long they took.

    Returns:
        Whether these inputs can tell: not where outputs differ, and PyTorch's own do as well after a rounding.

    Raises:
        UserError: an output differs by more than half precision or the order of sums can explain.
    """
    began = time.perf_counter()
    expected = run_torch(graph, inputs)
    torch_time = time.perf_counter() - began
    found, onnx_time = run_onnx(file, dict(zip(graph.inputs, inputs, strict=True)), graph.outputs)
    shapes = ", ".join("x".join(map(str, each.shape)) for each in inputs)
    print(f"  onnxruntime beside PyTorch on {shapes}: {onnx_time:.2f} s beside {torch_time:.2f} s on the CPU")
    worst, furthest = 0.0, ""
    for name, theirs, ours in zip(graph.outputs, found, expected, strict=True):
        absolute, relative = difference(theirs, ours)
        print(f"    {name} differs by at most {absolute:.1e}, {relative:.1e} of its largest value")
        if not relative <= worst:
            worst, furthest = relative, name
    if worst <= TOLERANCES[precision]:
        return True
    if worst < math.inf and jumps(graph, inputs, expected, precision):
        print("    which says nothing: PyTorch's own outputs differ as much when these inputs are rounded")
        return False
    hint = "; try --precision fp32" if precision == "fp16" else ""
    raise UserError(
        f"{file.name} computes something else than the model: {furthest} differs by {worst:.1e} of its largest "
        f"value on {shapes}, where {TOLERANCES[precision]:g} is allowed. No file was written{hint}"
    )


def run_torch(graph: Graph, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """The outputs of the module itself."""
    with torch.no_grad():
        outputs = graph.module(*inputs)
    return [each.numpy() for each in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]


def jumps(graph: Graph, inputs: Sequence[Tensor], expected: Sequence[np.ndarray], precision: str) -> bool:
    """Whether outputs of the module change by more than is allowed when its inputs do by a rounding."""
    random = torch.Generator().manual_seed(0)
    for _ in range(SHAKES):
        shaken = [
            each + ROUNDING[precision] * each.abs().max() * torch.randn(each.shape, generator=random)
            if each.is_floating_point()
            else each
            for each in inputs
        ]
        pairs = zip(run_torch(graph, shaken), expected, strict=True)
        if any(difference(*pair)[1] > TOLERANCES[precision] for pair in pairs):
            return True
    return False


def run_onnx(file: Path, inputs: Mapping[str, Tensor], outputs: list[str]) -> tuple[list[np.ndarray], float]:
    """(outputs, seconds) of a graph on the CPU, with as many threads as PyTorch has.

    Raises:
        UserError: onnxruntime cannot run the graph on these inputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        began = time.perf_counter()
        found = session.run(outputs, arrays)
    except Exception as error:  # onnxruntime has a type for each of its codes, and no common one
        shapes = ", ".join("x".join(map(str, each.shape)) for each in inputs.values())
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"onnxruntime cannot run {file.name} on {shapes}; no file was written: {reason}") from error
    return found, time.perf_counter() - began


def difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """The largest difference, by itself and as a share of the largest value; infinite for other shapes and for NaN."""
    if theirs.shape != ours.shape:
        return math.inf, math.inf
    gaps = np.abs(theirs.astype(np.float64) - ours)
    absolute = float(gaps.max(initial=0)) if not np.isnan(gaps).any() else math.inf
    return absolute, absolute / max(float(np.abs(ours).max(initial=0)), 1e-12)


# ---------------------------------------------------------------- the command


def command() -> None:
    """Read the command line, export, and say what was written."""
    settings = parse_options(ExportSettings, [word for word in sys.argv[1:] if word != "--debug"])
    if not settings.checkpoint:
        raise UserError("--checkpoint is missing: name a run folder, a checkpoint, or official weights; see --help")
    for file in run(settings):
        print(f"wrote {file}")


if __name__ == "__main__":
    run_command(command)
