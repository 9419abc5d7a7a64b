"""Decoding: strict, and the same way up for image and mask."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from readers.base import DataError, Fault

MAX_PIXELS = 400_000_000


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a picture into (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Grey, palette, 1-bit, CMYK and animated (first frame) pictures become RGB. Alpha is dropped, not composited: the
    colours under it are the picture. 16-bit grey is scaled by 1/257; of 16-bit colour PIL keeps the high byte, at most
    one level from that.

    Raises:
        DataError: unreadable, truncated, or more than 400 megapixels by its header (nothing is decoded then).
    """
    image = _decode(path)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return np.repeat(_to_bytes(np.asarray(image), path)[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # else PIL would bring a transparent colour into the conversion
    return np.array(image.convert("RGB"))


def read_alpha(path: str | os.PathLike[str], *, labels: bool = True) -> np.ndarray:
    """Decode a mask into (H, W) uint8 alpha, 0 background to 255 foreground, upright by its EXIF orientation.

    Soft values are kept. By kind of file:
      * 1-bit, or values of 0 and 1 alone: 1 means 255, the latter unless `labels` is false;
      * 16-bit: scaled by 1/257;
      * palette: a palette of greys gives those greys; any other is a label map, where every index but 0 is foreground;
      * with an alpha channel: that channel, unless it is opaque everywhere;
      * RGB: its luminance, as long as the picture is grey.

    Raises:
        DataError: as `read_image`, or a coloured picture, which is no mask.
    """
    image = _decode(path)
    if image.mode == "P":
        palette = np.array(image.getpalette() or [], dtype=np.uint8).reshape(-1, 3)
        if (palette == palette[:, :1]).all():
            values = np.array(image.convert("L"))
        else:
            values = np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
    elif image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = _to_bytes(np.asarray(image), path)
    elif image.mode in ("1", "L"):
        values = np.array(image.convert("L"))
    else:
        values = _alpha_of_colours(image, path)
    return values * np.uint8(255) if labels and values.max() == 1 else values


def read_labels(path: str | os.PathLike[str], *, what: str = "class ids") -> np.ndarray:
    """Decode a label map into (H, W) uint8 class ids as they stand in the file, upright by its EXIF orientation.

    Of a palette the indices are the ids, of grey of any depth the values; three equal channels count as grey.

    Raises:
        DataError: as `read_image`, a coloured picture, ids above 255, or a lossy format, which changes ids.
    """
    image = _decode(path)
    if image.format in ("JPEG", "MPO", "WEBP"):
        raise DataError(Fault(os.fspath(path), f"is {image.format}, which changes {what}; save masks as PNG"))
    values = np.asarray(image)
    if values.ndim == 3:
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[:, :, :1]).any():
            problem = f"is a coloured picture; the pixels of a mask hold {what}: save it as grey or palette PNG"
            raise DataError(Fault(os.fspath(path), problem))
        return np.ascontiguousarray(channels[:, :, 0])
    if values.max() > 255 or values.min() < 0 or image.mode == "F":
        problem = f"has {values.dtype} values up to {values.max()}; {what} are whole numbers from 0 to 254"
        raise DataError(Fault(os.fspath(path), problem))
    return values.astype(np.uint8) // np.uint8(_grey_step(path) if image.mode == "L" else 1)


def _grey_step(path: str | os.PathLike[str]) -> int:
    """The factor by which PIL spreads the greys of a PNG of 2 or 4 bits over 0 to 255; other files have 1."""
    with open(path, "rb") as file:
        header = file.read(26)
    return {2: 85, 4: 17}.get(header[24], 1) if header[1:4] == b"PNG" else 1


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    """Open and fully decode the first frame; PIL raises on truncation, where OpenCV fills with grey."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise DataError(Fault(os.fspath(path), "is no file but a folder, a pipe or a device"))
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # PIL warns from here on, which we refuse, and raises from twice as much
    try:
        # Only formats decoded in this process: PIL hands some others to external programs.
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError as error:
        raise DataError(Fault(os.fspath(path), "does not exist")) from error
    except Image.DecompressionBombError as error:
        problem = f"its header announces more than {MAX_PIXELS // 10**6} megapixels; scale it down or leave it out"
        raise DataError(Fault(os.fspath(path), problem)) from error
    except Exception as error:  # decoders raise nearly every kind of exception on broken files
        problem = f"cannot be read as an image ({error or type(error).__name__})"
        raise DataError(Fault(os.fspath(path), problem)) from error
    return image


def _to_bytes(values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Wide grey values to uint8: integers by 1/257 (0 and 1 alone stay), floats in [0, 1] by 255."""
    low, high = values.min(), values.max()
    top = 1 if np.issubdtype(values.dtype, np.floating) else 65535
    if not (low >= 0 and high <= top):
        raise DataError(Fault(os.fspath(path), f"has values from {low} to {high}, not from 0 to {top}"))
    if top == 65535 and high == 1:
        return values.astype(np.uint8)
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def _alpha_of_colours(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """The mask in a picture with alpha or colour channels."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = np.array(image.getchannel("A"))
        if alpha.min() < 255:
            return alpha
    colours = np.asarray(image.convert("RGB"))
    # JPEG may tint a grey picture by a few levels; a coloured one would give arbitrary alpha.
    if int((colours.max(axis=2) - colours.min(axis=2)).max()) > 32:
        raise DataError(Fault(os.fspath(path), "is a coloured picture, not a mask; save it as grey or palette PNG"))
    return np.array(image.convert("RGB").convert("L"))
