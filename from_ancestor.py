"""A preset that continues what another program was set up for: `python train.py --from_ancestor FILE [PRESET]`.

FILE is BiRefNet's `config.py` or its fork's `config_vars.yml` (or the folder of both), a SegFormer configuration of
mmsegmentation (`.py`) or Hugging Face (`config.json`), SAM 2's training YAML, or a checkpoint of RF-DETR, which holds
its options. Nothing in them is run. The preset says beside each value what it was called there, and ends with what
has no equivalent here.
"""

from __future__ import annotations

from pathlib import Path

from ancestors.birefnet import from_birefnet
from ancestors.preset import UNDERSTOOD, Preset
from ancestors.python_values import read_python
from ancestors.rfdetr import from_rfdetr
from ancestors.sam2 import from_sam2
from ancestors.segformer import from_hugging_face, from_mmsegmentation
from checkpoint import write_text
from config import read_yaml
from errors import UserError


def command(words: list[str], flags: list[str]) -> None:
    """`--from_ancestor FILE [PRESET]`: write the preset and say what is not in it.

    Raises:
        UserError: there is no such file, it is none that is understood, the preset exists, or there are `flags`.
    """
    if flags:
        raise UserError(f"{flags[0]}: --from_ancestor takes no settings; give them with the preset that it writes")
    if not 1 <= len(words) <= 2:
        raise UserError(f"--from_ancestor needs a file, and may have a second for the preset: {UNDERSTOOD}")
    source = Path(words[0])
    target = Path(words[1] if len(words) == 2 else f"from_{source.resolve().stem}.yml")
    if target.exists():
        raise UserError(f"{target} exists already; name another file: --from_ancestor {source} PRESET.yml")
    preset = translate(source)
    write_text(target, preset.text(source))
    print(f"wrote {target}: {len(preset.values)} settings of {preset.kind.family}")
    if preset.left_out:
        print("\n".join(["without an equivalent here:", *(f"  {line}" for line in preset.left_out)]))
    print(f"look at it, then: python train.py --config {target} --experiment_name NAME")


def translate(source: Path) -> Preset:
    """The preset of any of the files that are understood; `UserError` for others."""
    if source.is_dir():
        found = [source / name for name in ("config.py", "config.json", "config_vars.yml") if (source / name).is_file()]
        if not found:
            raise UserError(f"the folder {source} holds no config.py, config_vars.yml or config.json: name a file")
        source = found[0]
    if not source.is_file():
        raise UserError(f"no file {source}; --from_ancestor understands {UNDERSTOOD}")
    readers = {".py": from_python, ".yml": from_yaml, ".yaml": from_yaml, ".json": from_hugging_face}
    preset = readers.get(source.suffix.lower(), from_rfdetr)(source)
    preset.check()
    return preset


def from_python(source: Path) -> Preset:
    values = read_python(source)
    if "bb" in values:
        return from_birefnet(values, source)
    return from_mmsegmentation(values, source)


def from_yaml(source: Path) -> Preset:
    values = read_yaml(source)
    if "trainer" in values:
        return from_sam2(values, source)
    return from_birefnet({}, source)
