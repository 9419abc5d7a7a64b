"""Published weights, fetched only when a setting asks for them, kept in torch's hub folder.

Addresses are `https://…` or `hf-hub:<owner>/<name>`. Files whose name carries a hash (torchvision's) are checked
against it and the Hugging Face client checks its own; of the others the sha256 is noted at the first download and
checked at each later use.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch

from errors import UserError

REPOSITORY_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch(address: str) -> Path:
    """The local file behind an address, downloaded with a progress bar if need be.

    Raises `UserError` when it cannot be had (offline) or is not what it should be.
    """
    try:
        if address.startswith("hf-hub:"):
            return _fetch_from_hub(address.removeprefix("hf-hub:"))
        return _fetch_file(address)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot download {address} ({type(error).__name__}); fetch the file on a machine that is online and "
            "name its path as model.pretrained, or start with model.pretrained: none"
        ) from None


def _fetch_from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline = None
    for name in REPOSITORY_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # offline, where the other file may be kept
            offline = error
        except EntryNotFoundError:
            continue
    if offline:
        raise offline
    raise UserError(f"the repository {repository} holds neither {' nor '.join(REPOSITORY_FILES)}")


def _fetch_file(address: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    # Another address may end in the same name.
    place = hashlib.sha256(address.encode()).hexdigest()[:8]
    file = folder / f"{place}-{address.rpartition('/')[2]}"
    note = file.with_name(file.name + ".sha256")
    if not file.exists():
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        named = re.search(r"-([a-f0-9]{8,})\.\w+$", address)
        torch.hub.download_url_to_file(address, str(partial), hash_prefix=named[1] if named else None)
        note.write_text(_sha256(partial))
        os.replace(partial, file)
    if note.exists() and note.read_text() != _sha256(file):
        raise UserError(f"{file} is no longer what was downloaded: delete it, and it is fetched again")
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
