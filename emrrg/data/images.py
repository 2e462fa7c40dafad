"""Image files as people have them, to the pixels that the model takes.

    load_image(path, 224) -> (224, 224, 3) uint8      normalize(...) -> float32, ImageNet mean, std

8- and 16-bit grey, RGB, RGBA, palette and CMYK files, and DICOM (`emrrg.data.dicom`), told apart
by their content. More than 8 bits are mapped to 8 by a window, the file's own or the one asked
for. As the released models expect, the picture is stretched to a square by Pillow's bicubic
filter; ``fit="pad"`` keeps its proportions instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from emrrg.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, on pixels in [0, 1], red, green, blue."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded. The largest radiographs have some 30
million pixels; a file of a few kilobytes can claim billions."""

Fit = Literal["stretch", "pad"]
Window = Literal["file", "full", "percentile"] | tuple[float, float]

_BARE_DICOM = (
    *(bytes([2, 0, element, 0]) for element in (0x00, 0x01)),
    *(bytes([8, 0, element, 0]) for element in (0x00, 0x01, 0x05, 0x08, 0x12, 0x16, 0x60)),
)
"""How DICOM files without preamble begin: group and element of what may come first."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(
    path: str | Path,
    size: int | tuple[int, int],
    *,
    fit: Fit = "stretch",
    window: Window = "file",
    invert: bool | Literal["auto"] = False,
) -> NDArray[np.uint8]:
    """Read an image file and resize it.

    Args:
        path: PNG, JPEG, TIFF, BMP, ... or DICOM.
        size: side in pixels, or (height, width).
        fit: ``stretch`` ignores the proportions, ``pad`` keeps them on a black ground.
        window: how more than 8 bits become 8: ``file`` (a DICOM file's VOI LUT or first window;
            where there is none, as ``full``), ``full`` (darkest to brightest pixel),
            ``percentile`` (the 0.5th to the 99.5th percentile), or (centre, width) in the file's
            own units. 8-bit pictures are left as they are (in DICOM: where it has no window and
            none is asked for).
        invert: swap black and white; ``auto``: where `looks_inverted` says so. DICOM's
            MONOCHROME1 is turned upright in any case.
    Returns:
        (H, W, 3) uint8, red, green, blue.
    Raises:
        InputError: the file is missing, broken, truncated, empty, too large to be a radiograph
            or has several frames (the message names the file).
    """
    height, width = (size, size) if isinstance(size, int) else size
    picture = open_image(path, window=window)
    if invert == "auto":
        invert = looks_inverted(np.asarray(picture.convert("L")))
    if invert:
        picture = ImageOps.invert(picture)
    if fit == "pad":
        picture = _pad(picture, height, width)
    elif fit != "stretch":
        raise InputError(f"fit={fit!r}: expected stretch or pad")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture.convert("RGB"))


def open_image(path: str | Path, *, window: Window = "file") -> Image.Image:
    """Read an image file at its own size.

    Args:
        path: as in `load_image`.
        window: as in `load_image`.
    Returns:
        A picture of mode L (grey) or RGB, upright.
    Raises:
        InputError: as in `load_image`.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(132)
            file.seek(0)
            if not head:
                raise InputError(f"{path}: empty file")
            named = str(path).lower().endswith((".dcm", ".dicom"))
            if named or head[128:] == b"DICM" or head.startswith(_BARE_DICOM):
                from emrrg.data.dicom import read_dicom  # pydicom is slow to import

                return Image.fromarray(read_dicom(file, str(path), window))
            return _open_picture(file, path, window)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not an image") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read (permission denied)") from None


def normalize(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Pixels to what the encoder takes: x / 255, minus ImageNet's mean, over its deviation.

    Args:
        images: uint8, an array (..., H, W, 3) or a tensor (..., 3, H, W).
    Returns:
        (..., 3, H, W) float32, on the tensor's device.
    Raises:
        TypeError: the pixels are not uint8.
        ValueError: there are not three channels.
    """
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected (..., 3, H, W), got {tuple(images.shape)}")
    scale, shift = _channel_constants(images.device)
    return torch.addcmul(shift, images.float(), scale)


def looks_inverted(grey: NDArray[np.uint8]) -> bool:
    """Whether a chest radiograph seems to show air white and bone black.

    Around a chest there is air, below it the abdomen: in an upright radiograph the upper corners
    are darker than the middle of the picture and than the lower edge. A guess, for warnings and
    ``invert="auto"``.

    Args:
        grey: (H, W) uint8.
    """
    height, width = grey.shape
    if min(height, width) < 16:
        return False
    pixels = grey.astype(np.float32)
    side, band = max(width // 8, 1), max(height // 8, 1)
    edges = np.median(np.concatenate([pixels[:, :side], pixels[:, -side:]], axis=1))
    top = np.median(np.concatenate([pixels[:band, :side], pixels[:band, -side:]], axis=1))
    middle = np.median(pixels[:, width * 3 // 8 : width * 5 // 8])
    return bool(top > middle + 32 and edges > middle)


def to_eight_bits(
    values: NDArray[Any], window: Window, valid: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Map grey values of any type to 0..255, linearly between two of them.

    Args:
        values: (H, W) of any number type.
        window: as in `load_image`; ``file`` is taken as ``full``.
        valid: (H, W); pixels that are False do not count in ``full`` and ``percentile``.
    Returns:
        (H, W) uint8; an image of one value only is black.
    """
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    counted = values if valid is None or not valid.any() else values[valid]
    if isinstance(window, tuple):
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif window == "percentile":
        low, high = (float(v) for v in np.percentile(counted, (0.5, 99.5)))
    elif window in ("file", "full"):
        low, high = float(counted.min()), float(counted.max())
    else:
        raise InputError(f"window={window!r}: expected file, full, percentile or (centre, width)")

    def scale(grey: NDArray[Any]) -> NDArray[np.uint8]:
        scaled = (grey.astype(np.float64) - low) / max(high - low, 1e-12)
        return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)

    return map_values(values, scale)


def map_values(
    values: NDArray[Any],
    function: Callable[[NDArray[Any]], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Apply an elementwise function to an image; to each of its values once where they are few.

    Args:
        values: of any shape and number type.
        function: elementwise.
    Returns:
        uint8, of the image's shape.
    """
    if values.dtype.kind in "iu" and values.size > 2**16:
        low, high = int(values.min()), int(values.max())
        if high - low < 2**16:
            table = function(np.arange(low, high + 1).astype(values.dtype))
            return table[values.astype(np.int64) - low]
    return function(values)


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image that is empty or too large, before it is decoded.

    Raises:
        InputError: naming the file.
    """
    if width < 1 or height < 1:
        raise InputError(f"{name}: has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: {width} x {height} pixels is more than {MAX_PIXELS // 10**6} million; "
            "no radiograph is so large, so it is not decoded"
        )


def _open_picture(file: BinaryIO, path: str | Path, window: Window) -> Image.Image:
    try:
        with Image.open(file) as picture:
            check_size(*picture.size, str(path))
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # MPO: a phone's photograph and its preview
                raise InputError(
                    f"{path}: {frames} frames; a radiograph has one: save the one you mean"
                )
            picture.load()
            # Pillow turns 8-bit TIFF files in which white is zero upright, deeper ones it does not.
            white_is_zero = getattr(picture, "tag_v2", {}).get(262) == 0
            return _eight_bit_modes(ImageOps.exif_transpose(picture), window, white_is_zero)
    except InputError:
        raise
    except _BOMBS:
        raise InputError(
            f"{path}: more than {MAX_PIXELS // 10**6} million pixels; no radiograph is so large, "
            "so it is not decoded"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image (no known format)") from None
    except Exception as error:  # decoders raise nearly anything on broken files
        detail = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: broken or truncated image: {detail}") from None


def _eight_bit_modes(picture: Image.Image, window: Window, white_is_zero: bool) -> Image.Image:
    """Whatever mode Pillow gives, as L or RGB."""
    mode = picture.mode
    if mode in ("L", "RGB"):
        return picture
    if mode.startswith("I") or mode == "F":  # 16-bit grey, 32-bit grey, floating point
        eight = to_eight_bits(np.asarray(picture), window)
        return Image.fromarray(255 - eight if white_is_zero else eight)
    if mode == "1":
        return picture.convert("L")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture).convert("RGB")
    return picture.convert("RGB")  # P, CMYK, YCbCr, LAB, HSV


def _pad(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Put black beside or above and below, until the proportions are height : width."""
    have_width, have_height = picture.size
    want_width = max(have_width, -(-have_height * width // height))
    want_height = max(have_height, -(-have_width * height // width))
    padded = Image.new(picture.mode, (want_width, want_height), 0)
    padded.paste(picture, ((want_width - have_width) // 2, (want_height - have_height) // 2))
    return padded


@lru_cache(maxsize=8)
def _channel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1) each, so that normalising is one multiplication and addition."""
    mean = torch.tensor(MEAN, dtype=torch.float64)
    std = torch.tensor(STD, dtype=torch.float64)
    scale, shift = 1 / (255 * std), -mean / std
    return scale.float().view(3, 1, 1).to(device), shift.float().view(3, 1, 1).to(device)
