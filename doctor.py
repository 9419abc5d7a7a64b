"""`python train.py --doctor`: what this runs on and what is wrong with it, to paste into a report of a fault.

Apart from everything else, and without importing any of it: what is broken here may be what the program imports.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

GIB = 2**30
ROOT = Path(__file__).resolve().parent
TORCH_NEEDED = (2, 10)  # older ones run code from a checkpoint (CVE-2025-32434, CVE-2026-24747)
IMPORTS = {
    "torch": "import torch; print(torch.__version__, 'CUDA', torch.version.cuda, 'devices', *(torch.cuda."
             "get_device_name(i) for i in range(torch.cuda.device_count())), 'MPS', torch.backends.mps.is_available())",
    "torchvision": "import torchvision; print(torchvision.__version__)",
    "cv2": "import cv2; print(cv2.__version__)",
    "albumentations": "import albumentations; print(albumentations.__version__)",
    "pycocotools": "import pycocotools.mask; print('imports')",
}  # fmt: skip


def examine() -> Iterator[tuple[str, str, str]]:
    """(what, how it is, what is wrong with it or nothing) of everything worth knowing."""
    yield "python", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores", ""
    yield from requirements(ROOT / "requirements.txt")
    found = {module: imported(code) for module, code in IMPORTS.items()}
    for module, (how, wrong) in found.items():
        yield f"import {module}", how, wrong
    yield "torch and torchvision", *pairing(*(found[module][0].split()[0] for module in ("torch", "torchvision")))
    yield "cv2", *owners("cv2", "opencv-python-headless")
    yield "albumentations", *owners("albumentations", "albumentations")
    for what, path, needed in (("disk", Path.cwd(), 5.0), ("temporary files", Path(tempfile.gettempdir()), 1.0),
                               ("shared memory", Path("/dev/shm"), 0.5)):  # fmt: skip
        if path.exists():
            yield what, *room(path, needed)


def requirements(path: Path) -> Iterator[tuple[str, str, str]]:
    """The version of each package that requirements.txt asks for."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^#;]*)", line)
        if match:
            wanted = match[2].strip()
            try:
                version = distribution(match[1]).version
            except PackageNotFoundError:
                yield match[1], "not installed", f"pip install '{match[1]}{wanted}'"
                continue
            wrong = wanted.startswith("==") and version.partition("+")[0] != wanted[2:].strip()
            yield match[1], version, f"requirements.txt asks for {wanted}" if wrong else ""


def imported(code: str) -> tuple[str, str]:
    """(what the code prints, why it fails) in a process of its own, which may crash."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip(), ""
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return "fails", last[:300]


def pairing(torch: str, torchvision: str) -> tuple[str, str]:
    """Whether the two versions that import were built for each other: by number, and from one index."""
    said = f"{torch} and {torchvision}"
    number = tuple(int(part) for part in re.findall(r"\d+", torch)[:2])
    if number and number < TORCH_NEEDED:
        return said, f"torch {'.'.join(map(str, TORCH_NEEDED))} or newer is needed: older ones may run code from files"
    installed = version_of("torch")
    pinned = built_for()
    if installed and pinned and pinned != installed.partition("+")[0]:
        return said, f"this torchvision was built for torch {pinned}: install both in one command from one index"
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if number and builds[0] != builds[1]:
        return said, f"builds {builds[0] or 'of PyPI'} and {builds[1] or 'of PyPI'}: install both from one index"
    return said, ""


def built_for() -> str:
    """The version of torch that the installed torchvision asks for."""
    try:
        needs = distribution("torchvision").requires or []
    except PackageNotFoundError:
        return ""
    return next((found[1] for line in needs if (found := re.match(r"torch\s*\(?==\s*([\d.]+)", line))), "")


def owners(package: str, expected: str) -> tuple[str, str]:
    """(who owns a package's folder, what is wrong with that): two wheels with one folder overwrite each other."""
    found = sorted({name(each) for each in distributions() if owns(each, package)})
    if found == [expected]:
        return f"from {expected} alone", ""
    if not found:
        return "from no installed package", f"pip install {expected}"
    return f"from {' and '.join(found)}", f"pip uninstall {' '.join(found)}, then pip install -r requirements.txt"


def owns(each: Distribution, package: str) -> bool:
    top = (each.read_text("top_level.txt") or "").split()
    return package in top or any(file.parts[:2] == (package, "__init__.py") for file in each.files or [])


def name(each: Distribution) -> str:
    return (each.metadata["Name"] or "").lower()


def version_of(package: str) -> str | None:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def room(path: Path, needed: float) -> tuple[str, str]:
    """Free space at a path, and whether it is less than `needed` GiB."""
    free = shutil.disk_usage(path).free / GIB
    return f"{free:.1f} GiB free", f"less than {needed:g} GiB" if free < needed else ""


def command(show: Callable[[str], None] = print) -> int:
    """Print everything, faults at the end again; returns how many there are, at most 1."""
    faults = []
    for what, how, wrong in examine():
        show(f"{what}: {how}" + (f" — {wrong}" if wrong else ""))
        if wrong:
            faults.append(f"{what}: {wrong}")
    show("\n" + ("\n".join([f"{len(faults)} faults:", *faults]) if faults else "nothing wrong was found"))
    return min(1, len(faults))
