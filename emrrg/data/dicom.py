"""A DICOM radiograph to 8-bit pixels, as a workstation would show it.

Stored values -> modality LUT or rescale -> the file's VOI LUT or window, or the one asked for ->
MONOCHROME1 turned upright -> 0..255 (DICOM PS3.3, C.7.6.3.1.2 and C.11).

Uncompressed, RLE, JPEG baseline and JPEG 2000 files are decoded by what is installed with this
package; JPEG Lossless and JPEG-LS need a plug-in of pydicom, which the message names.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGExtended12Bit

from emrrg.data.images import Window, check_size, map_values, to_eight_bits
from emrrg.errors import InputError

DECODERS = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg (or python-gdcm)"
"""What to install for encodings that Pillow does not know."""


def read_dicom(file: BinaryIO, name: str, window: Window = "file") -> NDArray[np.uint8]:
    """Decode a DICOM file of one frame.

    Args:
        file: open for reading, at its start.
        name: its path, for messages too.
        window: as in `emrrg.data.images.load_image`.
    Returns:
        (H, W) uint8 grey or (H, W, 3) uint8 RGB.
    Raises:
        InputError: no DICOM, no pixels, several frames, too many pixels, an encoding for which
            no decoder is installed, or broken (the message names the file).
    """
    try:
        with warnings.catch_warnings(), _quiet() as told:
            warnings.simplefilter("ignore")  # odd values in fields that are not used here
            dataset = _read(file, name)
            if "PixelData" not in dataset and any("End of file" in line for line in told):
                raise InputError(f"{name}: broken or truncated DICOM file: it ends too early")
            return _pixels(dataset, name, window)
    except InputError:
        raise
    except InvalidDicomError:
        raise InputError(f"{name}: not a DICOM file") from None
    except Exception as error:  # pydicom and its decoders raise nearly anything on broken files
        detail = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: broken or truncated DICOM file: {detail}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep back, as a list, what pydicom logs of the file that this thread reads."""
    here, logger = threading.get_ident(), logging.getLogger("pydicom")
    told: list[str] = []

    def of_others(record: logging.LogRecord) -> bool:
        if record.thread == here:
            told.append(record.getMessage())
        return record.thread != here

    logger.addFilter(of_others)
    try:
        yield told
    finally:
        logger.removeFilter(of_others)


def _read(file: BinaryIO, name: str) -> pydicom.FileDataset:
    file.seek(128)
    has_preamble = file.read(4) == b"DICM"
    file.seek(0)
    if has_preamble:
        meta = pydicom.filereader.read_file_meta_info(name)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise InputError(
                f"{name}: deflated DICOM may unpack to any size, so it is not read; "
                "rewrite it uncompressed (dcmconv +te)"
            )
    return pydicom.dcmread(file, force=not has_preamble)


def _pixels(dataset: pydicom.FileDataset, name: str, window: Window) -> NDArray[np.uint8]:
    if not any(k in dataset for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = dataset.get("Modality", "")
        raise InputError(f"{name}: a DICOM file without an image{kind and f' (modality {kind})'}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise InputError(
            f"{name}: {frames} frames (a series or a video); a radiograph has one: "
            "save the one you mean"
        )
    check_size(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), name)
    if "PhotometricInterpretation" not in dataset:
        dataset.PhotometricInterpretation = "MONOCHROME2"
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        dataset.file_meta = getattr(dataset, "file_meta", None) or pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not pydicom.pixels.get_decoder(syntax).is_available:
        raise InputError(f"{name}: {syntax.name}: no decoder is installed; pip install {DECODERS}")
    try:
        stored = dataset.pixel_array
    except RuntimeError as error:  # every decoder that is installed gave up
        if syntax != JPEGExtended12Bit:
            raise
        raise InputError(
            f"{name}: {syntax.name}: no decoder for it is installed, or the file is broken; "
            f"pip install {DECODERS}"
        ) from error
    photometric = str(dataset.PhotometricInterpretation).strip().upper()
    if photometric == "PALETTE COLOR":
        return to_eight_bits(apply_color_lut(stored, dataset), "full")
    if stored.ndim == 3:  # pydicom has turned YBR into RGB
        return stored if stored.dtype == np.uint8 else to_eight_bits(stored, "full")
    if stored.ndim != 2:
        raise InputError(f"{name}: pixels of shape {stored.shape}; expected one grey or RGB frame")

    padding = _padding(stored, dataset)
    if window == "file" and _has_voi(dataset):
        grey = map_values(
            stored, lambda few: _file_window(apply_modality_lut(few, dataset), dataset)
        )
        return _finish(grey, photometric, padding)
    values = apply_modality_lut(stored, dataset)
    if window == "file" and values.dtype == np.uint8:
        grey = values.copy()
    else:
        grey = to_eight_bits(values, window, None if padding is None else ~padding)
    return _finish(grey, photometric, padding)


def _finish(
    grey: NDArray[np.uint8], photometric: str, padding: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    if photometric == "MONOCHROME1":
        grey = 255 - grey
    if padding is not None:
        grey[padding] = 0
    return grey


def _has_voi(dataset: pydicom.Dataset) -> bool:
    if dataset.get("VOILUTSequence"):
        return True
    width = dataset.get("WindowWidth")
    return dataset.get("WindowCenter") is not None and width is not None and _first(width) > 0


def _file_window(values: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[np.uint8]:
    """The file's first VOI LUT, or its first window, spread over 0..255."""
    if dataset.get("VOILUTSequence"):
        entry = dataset.VOILUTSequence[0]
        bits = np.uint8 if entry.LUTDescriptor[2] <= 8 else np.uint16
        highest = int(np.frombuffer(_bytes(entry.LUTData), bits).max(initial=1)) or 1
        shown = apply_voi(values.astype(np.int64), dataset, index=0)
        return to_eight_bits(shown, (highest / 2, highest))
    shown = apply_windowing(values, dataset, index=0)
    ends = apply_windowing(np.array([-1e12, 1e12]), dataset, index=0)
    low, high = float(ends.min()), float(ends.max())
    return to_eight_bits(shown, ((low + high) / 2, high - low))


def _bytes(lut: Any) -> bytes:
    return lut if isinstance(lut, bytes) else np.asarray(lut, np.uint16).tobytes()


def _first(value: Any) -> float:
    return float(value if isinstance(value, str | int | float) else value[0])


def _padding(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Pixels that hold no image (outside the collimator, beside a scanned film)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    padding = (stored >= low) & (stored <= high)
    return padding if padding.any() and not padding.all() else None
