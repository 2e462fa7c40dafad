"""Image files of every kind, against pixels that were worked out another way."""

from __future__ import annotations

import importlib.util
import io
import logging
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian

from emrrg.data import dicom, images
from emrrg.data.images import load_image, looks_inverted, normalize, open_image
from emrrg.errors import InputError

SHARED = Path(__file__).parents[2] / "../shared/data"


def ramp(height: int = 24, width: int = 32, top: int = 255) -> np.ndarray:
    """(H, W) from 0 to top: no turn or flip leaves it as it is."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = rows * 3 + columns * 5
    values[4:8, :6] = values.max()
    return np.rint(values * (top / values.max())).astype(np.uint16 if top > 255 else np.uint8)


def make_dicom(path: Path, pixels: np.ndarray, **fields: object) -> Path:
    """Write an uncompressed DICOM file; fields overwrite or, as None, delete elements."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = fields.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Modality = "CR"
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 and pixels.shape[-1] == 3 else 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, **options: object) -> np.ndarray:
    """(H, W) int: the file at its own size."""
    picture = open_image(path, **options)  # type: ignore[arg-type]
    assert picture.mode == "L"
    return np.asarray(picture).astype(int)


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_every_sample_file_loads_as_pillow_has_it() -> None:
    files = sorted((SHARED / "xray-sample/images").glob("*/*"))
    assert len(files) == 31
    for file in files:
        expected = Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        got = load_image(file, 64)
        assert got.dtype == np.uint8 and got.shape == (64, 64, 3)
        difference = np.abs(got.astype(int) - np.asarray(expected)).max()
        assert difference == 0, f"{file.name}: {difference}"


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_sample_dicom_monochrome1_is_the_negative_of_monochrome2() -> None:
    upright = load_image(SHARED / "dicom/rsna_1.2.276.dcm", 96).astype(int)
    flagged = load_image(SHARED / "dicom/Fake_MONOHR1.dcm", 96).astype(int)
    assert upright.std() > 30
    assert np.abs(255 - upright - flagged).max() <= 1
    assert not looks_inverted(upright[..., 0].astype(np.uint8))
    assert looks_inverted(flagged[..., 0].astype(np.uint8))


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_inverted_films_are_noticed_and_upright_ones_are_not() -> None:
    files = sorted((SHARED / "xray-sample/images").glob("*/*"))
    upright = [np.asarray(open_image(f).convert("L")) for f in files]
    assert not any(looks_inverted(image) for image in upright)
    assert sum(looks_inverted(255 - image) for image in upright) >= 28


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png"),
     ("L", "tiff"), ("RGB", "bmp"), ("P", "gif"), ("L", "webp")],
)  # fmt: skip
def test_eight_bit_modes_keep_their_grey_values(mode: str, suffix: str, tmp_path: Path) -> None:
    pixels = ramp() if mode != "1" else (ramp() > 100).astype(np.uint8) * 255
    picture = Image.fromarray(pixels).convert(mode, **({"dither": 0} if mode == "1" else {}))
    file = tmp_path / f"image.{suffix}"
    picture.save(file, **({"lossless": True} if suffix == "webp" else {}))
    got = np.asarray(open_image(file).convert("L")).astype(int)
    assert np.abs(got - pixels).max() <= (1 if suffix == "webp" else 0)


def test_transparency_shows_black_not_hidden_colour(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:, :4, 3], pixels[:, 4:, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    got = np.asarray(open_image(tmp_path / "alpha.png"))
    assert got[:, :4].max() == 0 and got[:, 4:].min() == 200


def test_cmyk_jpeg(tmp_path: Path) -> None:
    pixels = ramp()
    Image.fromarray(pixels).convert("RGB").convert("CMYK").save(
        tmp_path / "cmyk.jpg", quality=100, subsampling=0
    )
    got = np.asarray(open_image(tmp_path / "cmyk.jpg").convert("L")).astype(int)
    assert np.abs(got - pixels).mean() < 2


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_spread_over_eight(suffix: str, tmp_path: Path) -> None:
    pixels = ramp(top=4095) + 1000
    Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}")
    file = tmp_path / f"deep.{suffix}"
    expected = np.rint((pixels - 1000) / 4095 * 255)
    np.testing.assert_array_equal(grey(file), expected)
    low, high = 2000, 3000
    windowed = np.rint(np.clip((pixels.astype(float) - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(grey(file, window=(2500.0, 1000.0)), windowed)
    assert grey(file, window="percentile").mean() != expected.mean()


def test_deep_tiff_in_which_white_is_zero(tmp_path: Path) -> None:
    pixels = ramp(top=4095)
    Image.fromarray(pixels).save(tmp_path / "negative.tiff", tiffinfo={262: 0})
    with Image.open(tmp_path / "negative.tiff") as stored:
        assert stored.tag_v2[262] == 0  # type: ignore[attr-defined]
    expected = 255 - np.rint(pixels / 4095 * 255)
    np.testing.assert_array_equal(grey(tmp_path / "negative.tiff"), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("window", ["full", "percentile", (100.0, 3000.0)])
def test_large_images_are_mapped_as_small_ones(dtype: type, window: images.Window) -> None:
    """From 2^16 pixels on, whole numbers go through a table."""
    low, high = (0, 255) if dtype is np.uint8 else (0 if dtype is np.uint16 else -900, 3000)
    pixels = np.random.default_rng(0).integers(low, high, (300, 300)).astype(dtype)
    got = images.to_eight_bits(pixels, window)
    if window == "full":
        ends = float(pixels.min()), float(pixels.max())
    elif window == "percentile":
        ends = tuple(np.percentile(pixels.astype(np.float64), (0.5, 99.5)))
    else:
        ends = -1400.0, 1600.0
    expected = np.clip((pixels.astype(np.float64) - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255
    assert np.abs(got - expected).max() <= 0.5 + 1e-6


def test_float_tiff_with_holes(tmp_path: Path) -> None:
    pixels = ramp().astype(np.float32) / 255
    pixels[0, 0] = np.nan
    Image.fromarray(pixels).save(tmp_path / "float.tiff")
    assert np.abs(grey(tmp_path / "float.tiff")[1:] - ramp()[1:].astype(int)).max() <= 1


def test_constant_sixteen_bit_image_is_black_not_nan(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 777, np.uint16)).save(tmp_path / "flat.png")
    assert grey(tmp_path / "flat.png").max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, tmp_path: Path) -> None:
    upright = ramp()
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
            5: np.transpose, 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T,
            8: lambda a: np.rot90(a, -1)}  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(grey(tmp_path / "turned.png"), upright)


def test_stretch_is_bicubic_and_pad_keeps_proportions(tmp_path: Path) -> None:
    pixels = np.full((40, 80), 100, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (load_image(tmp_path / "wide.png", 32) == 100).all()
    padded = load_image(tmp_path / "wide.png", 32, fit="pad")[..., 0]
    assert padded.shape == (32, 32)
    assert padded[:6].max() == 0 and padded[-6:].max() == 0 and padded[11:21].min() == 100
    tall = load_image(tmp_path / "wide.png", (48, 16))
    assert tall.shape == (48, 16, 3)
    with pytest.raises(InputError, match="fit"):
        load_image(tmp_path / "wide.png", 32, fit="crop")  # type: ignore[arg-type]


def test_invert_on_request_and_by_guess(tmp_path: Path) -> None:
    chest = np.full((64, 64), 20, np.uint8)
    chest[:, 24:40] = 220
    Image.fromarray(chest).save(tmp_path / "upright.png")
    Image.fromarray(255 - chest).save(tmp_path / "negative.png")
    expected = load_image(tmp_path / "upright.png", 64)
    for name in ("upright.png", "negative.png"):
        np.testing.assert_array_equal(load_image(tmp_path / name, 64, invert="auto"), expected)
    np.testing.assert_array_equal(load_image(tmp_path / "negative.png", 64, invert=True), expected)


class TestDicom:
    def test_without_a_window_the_range_is_spread(self, tmp_path: Path) -> None:
        pixels = ramp(top=4095)
        file = make_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11)
        np.testing.assert_array_equal(grey(file), np.rint(pixels / 4095 * 255))

    def test_eight_bits_without_a_window_stay_as_they_are(self, tmp_path: Path) -> None:
        pixels = ramp() // 2 + 40
        np.testing.assert_array_equal(grey(make_dicom(tmp_path / "a.dcm", pixels)), pixels)

    def test_monochrome1_is_turned_upright(self, tmp_path: Path) -> None:
        file = make_dicom(tmp_path / "a.dcm", ramp(), PhotometricInterpretation="MONOCHROME1")
        np.testing.assert_array_equal(grey(file), 255 - ramp().astype(int))

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_window_by_the_standards_equations(self, function: str, tmp_path: Path) -> None:
        pixels = ramp(300, 300, top=4000)
        file = make_dicom(
            tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11, VOILUTFunction=function,
            WindowCenter=[1800, 600], WindowWidth=[1200, 400],
            RescaleSlope=2, RescaleIntercept=-1000,
        )  # fmt: skip
        x, c, w = pixels * 2.0 - 1000, 1800.0, 1200.0
        shown = {  # DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3
            "LINEAR": np.clip((x - (c - 0.5)) / (w - 1) + 0.5, 0, 1),
            "LINEAR_EXACT": np.clip((x - c) / w + 0.5, 0, 1),
            "SIGMOID": 1 / (1 + np.exp(-4 * (x - c) / w)),
        }[function]
        assert np.abs(grey(file) - shown * 255).max() <= 1
        chosen = np.clip((x - 500) / 1000, 0, 1)
        assert np.abs(grey(file, window=(1000.0, 1000.0)) - chosen * 255).max() <= 1

    def test_voi_lut_sequence_goes_before_the_window(self, tmp_path: Path) -> None:
        pixels = ramp(top=1023)
        table = (np.arange(1024) / 1023.0) ** 2 * 65535
        item = pydicom.Dataset()
        item.LUTDescriptor = [1024, 0, 16]
        item.LUTData = table.astype(np.uint16).tobytes()
        file = make_dicom(
            tmp_path / "a.dcm", pixels, BitsStored=10, HighBit=9,
            VOILUTSequence=DicomSequence([item]), WindowCenter=100, WindowWidth=10,
        )  # fmt: skip
        assert np.abs(grey(file) - (pixels / 1023.0) ** 2 * 255).max() <= 1

    def test_padding_does_not_count_and_is_black(self, tmp_path: Path) -> None:
        pixels = ramp(top=900) + 100
        pixels[:, :5] = 65535
        for photometric in ("MONOCHROME2", "MONOCHROME1"):
            file = make_dicom(
                tmp_path / f"{photometric}.dcm", pixels, PixelPaddingValue=65535,
                PhotometricInterpretation=photometric,
            )  # fmt: skip
            got = grey(file)
            assert got[:, :5].max() == 0
            assert got[:, 5:].min() == 0 and got[:, 5:].max() == 255

    def test_signed_pixels(self, tmp_path: Path) -> None:
        pixels = (ramp(top=2000).astype(np.int16) - 1000).astype(np.int16)
        file = make_dicom(tmp_path / "a.dcm", pixels)
        np.testing.assert_array_equal(grey(file), np.rint((pixels + 1000.0) / 2000 * 255))

    def test_colour(self, tmp_path: Path) -> None:
        pixels = np.stack([ramp(), ramp() // 2, 255 - ramp()], axis=-1)
        file = make_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="RGB")
        np.testing.assert_array_equal(np.asarray(open_image(file)), pixels)

    def test_run_length_encoding(self, tmp_path: Path) -> None:
        file = make_dicom(tmp_path / "a.dcm", ramp())
        dataset = pydicom.dcmread(file)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(tmp_path / "rle.dcm")
        np.testing.assert_array_equal(grey(tmp_path / "rle.dcm"), ramp())

    @pytest.mark.parametrize("bits", [8, 12, 16])
    def test_jpeg_2000(self, bits: int, tmp_path: Path) -> None:
        pixels = ramp() if bits == 8 else ramp().astype(np.uint16) << (bits - 8)
        dataset = pydicom.dcmread(
            make_dicom(tmp_path / "a.dcm", pixels, BitsStored=bits, HighBit=bits - 1)
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / "j2k.dcm")
        np.testing.assert_array_equal(grey(tmp_path / "j2k.dcm"), grey(tmp_path / "a.dcm"))

    def test_no_preamble_and_no_meta(self, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(make_dicom(tmp_path / "a.dcm", ramp()))
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True)
        np.testing.assert_array_equal(grey(tmp_path / "bare.dcm"), ramp())
        (tmp_path / "bare.dcm").rename(tmp_path / "no_extension")
        np.testing.assert_array_equal(grey(tmp_path / "no_extension"), ramp())
        whole = make_dicom(tmp_path / "b.dcm", ramp()).read_bytes()
        (tmp_path / "no_preamble").write_bytes(whole[132:])
        np.testing.assert_array_equal(grey(tmp_path / "no_preamble"), ramp())

    def test_pydicom_says_nothing_of_a_file_that_is_cut_short(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Our one line is enough; what pydicom tells others is not kept from them."""
        file = make_dicom(tmp_path / "a.dcm", ramp())
        dataset = pydicom.dcmread(file)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(file)
        whole = file.read_bytes()
        file.write_bytes(whole[:-40])
        with pytest.raises(InputError, match=r"a\.dcm: broken or .* it ends too early"):
            load_image(file, 16)
        assert not caplog.messages
        logger = logging.getLogger("pydicom")

        def elsewhere() -> None:
            logger.warning("of another thread")

        def decode(*_: object) -> np.ndarray:
            logger.warning("of this thread")
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            raise ValueError("broken")

        file.write_bytes(whole)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError):
            patch.setattr(dicom, "_pixels", decode)
            load_image(file, 16)
        logger.warning("afterwards")
        assert caplog.messages == ["of another thread", "afterwards"]

    def test_content_counts_not_the_name(self, tmp_path: Path) -> None:
        make_dicom(tmp_path / "a.dcm", ramp()).rename(tmp_path / "no_extension")
        np.testing.assert_array_equal(grey(tmp_path / "no_extension"), ramp())

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"NumberOfFrames": 3, "Rows": 8}, "3 frames"),
            ({"PixelData": None}, "without an image"),
            ({"Rows": 60000, "Columns": 60000}, "60000 x 60000"),
            ({"Rows": 0}, "no pixels"),
            ({"Rows": 240}, "broken or truncated"),
            ({"BitsAllocated": None}, "broken or truncated"),
            ({"syntax": pydicom.uid.DeflatedExplicitVRLittleEndian}, "deflated"),
        ],
    )
    def test_refused_with_the_reason(
        self, fields: dict[str, object], says: str, tmp_path: Path
    ) -> None:
        file = make_dicom(tmp_path / "bad.dcm", ramp(), **fields)
        with pytest.raises(InputError, match=says) as caught:
            load_image(file, 32)
        assert "bad.dcm" in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["JPEGLosslessSV1", "JPEGLSLossless", "JPEGExtended12Bit"])
    def test_encoding_without_a_decoder_names_what_to_install(
        self, name: str, tmp_path: Path
    ) -> None:
        syntax = getattr(pydicom.uid, name)
        pixels = ramp().astype(np.uint16)
        dataset = pydicom.dcmread(make_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11))
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / "lossless.dcm")
        if importlib.util.find_spec("pylibjpeg") or importlib.util.find_spec("gdcm"):
            pytest.skip("a decoder for it is installed")
        with pytest.raises(InputError, match="pylibjpeg"):
            load_image(tmp_path / "lossless.dcm", 32)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def truncated(suffix: str) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (90, 90), np.uint8)).save(buffer, suffix)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (truncated("png"), "broken or truncated"),
        (truncated("jpeg"), "broken or truncated"),
        (truncated("tiff"), "broken or truncated"),
        (png_header(11_000, 10_000), "million"),
        (png_header(60_000, 60_000), "million"),
        (b"\0" * 128 + b"DICM" + b"\0" * 40, "DICOM"),
    ],
)
def test_broken_files_are_refused_by_name(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.bin"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=says) as caught:
            load_image(file, 32)
    assert "broken.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "suffix", ["png", "jpeg", "tiff", "gif", "bmp", "webp", "jpeg2000", "ppm", "dds", "dcm"]
)
def test_damaged_files_load_or_are_refused(suffix: str, tmp_path: Path) -> None:
    """Sixty random changes a format; whatever a decoder raises, the user sees one line."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30), np.uint8)
    file = tmp_path / "seed.bin"
    if suffix == "dcm":
        make_dicom(file, pixels.astype(np.uint16), WindowCenter=100, WindowWidth=90)
    else:
        Image.fromarray(pixels).convert("RGBA" if suffix == "dds" else "L").save(file, suffix)
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(whole)
            for where in rng.integers(0, min(len(whole), rng.choice([60, len(whole)])), 4):
                damaged[where] = rng.integers(256)
            file.write_bytes(
                damaged[: rng.integers(1, len(damaged)) if rng.random() < 0.3 else None]
            )
            try:
                assert load_image(file, 16).shape == (16, 16, 3)
            except InputError as error:
                refused += 1
                assert "seed.bin" in str(error) and "\n" not in str(error)
    assert refused > 5


def test_missing_file_folder_and_animation_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png", 32)
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path, 32)
    frames = [Image.fromarray(ramp() // k) for k in (1, 2, 3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"film\.gif: 3 frames"):
        load_image(tmp_path / "film.gif", 32)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 5, 7)])
def test_normalize_against_the_definition(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected = (pixels / 255.0 - np.array(images.MEAN)) / np.array(images.STD)
    expected = torch.from_numpy(np.moveaxis(expected, -1, -3))
    got = normalize(pixels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)
    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
    torch.testing.assert_close(normalize(channels_first), got, atol=0, rtol=0)


def test_normalize_refuses_what_is_not_pixels() -> None:
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="3, H, W"):
        normalize(torch.zeros(1, 4, 4, dtype=torch.uint8))
