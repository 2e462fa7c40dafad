"""The cache gives the very pixels, to every process, and never more than its bytes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from emrrg.data.image_cache import ImageCache
from emrrg.data.images import load_image
from emrrg.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twelve different images."""
    rng = np.random.default_rng(0)
    paths = []
    for k in range(12):
        paths.append(tmp_path / f"{k}.png")
        Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(paths[-1])
    return paths


def test_hits_equal_loads_and_are_not_shared_arrays(files: list[Path]) -> None:
    cache = ImageCache(32)
    expected = [load_image(f, 32) for f in files]
    for _ in range(2):
        for file, pixels in zip(files, expected, strict=True):
            got = cache.load(file)
            np.testing.assert_array_equal(got, pixels)
            got[:] = 0  # the caller's own
    assert (cache.misses, cache.hits) == (12, 12)
    cache.close()


def test_options_are_the_loaders(files: list[Path]) -> None:
    cache = ImageCache((24, 32), fit="pad", invert=True)
    for _ in range(2):
        expected = load_image(files[0], (24, 32), fit="pad", invert=True)
        np.testing.assert_array_equal(cache.load(files[0]), expected)


def test_a_changed_file_is_read_again(files: list[Path]) -> None:
    cache = ImageCache(32)
    cache.load(files[0])
    Image.new("L", (40, 50), 77).save(files[0])
    assert (cache.load(files[0]) == 77).all()


def test_bytes_are_bounded(files: list[Path]) -> None:
    room = 5 * (32 * 32 * 3 + 24)
    cache = ImageCache(32, max_bytes=room)
    for _ in range(3):
        for file in files:
            np.testing.assert_array_equal(cache.load(file), load_image(file, 32))
    assert cache.path.stat().st_size <= room
    assert cache.hits == 2 * 5  # the five that came first stayed
    off = ImageCache(32, max_bytes=100)
    off.load(files[0])
    off.load(files[0])
    assert off.hits == 0 and off.path.stat().st_size == 0


def test_a_damaged_slot_is_decoded_again(files: list[Path]) -> None:
    cache = ImageCache(32, max_bytes=32 * 32 * 3 + 24)  # one slot
    expected = cache.load(files[0])
    with open(cache.path, "r+b") as raw:
        raw.seek(1000)
        raw.write(b"\0\1\2\3\4\5\6\7")
    np.testing.assert_array_equal(cache.load(files[0]), expected)
    with open(cache.path, "r+b") as raw:
        raw.truncate(1500)  # as a writer that was killed leaves it
    np.testing.assert_array_equal(cache.load(files[0]), expected)
    assert cache.hits == 0
    np.testing.assert_array_equal(cache.load(files[0]), expected)
    assert cache.hits == 1


def test_errors_pass_through(tmp_path: Path) -> None:
    cache = ImageCache(32)
    for _ in range(2):
        with pytest.raises(InputError, match="no such file"):
            cache.load(tmp_path / "none.png")


def test_a_directory_survives_and_a_temporary_file_does_not(
    files: list[Path], tmp_path: Path
) -> None:
    kept = ImageCache(32, directory=tmp_path / "cache")
    kept.load(files[0])
    kept.close()
    again = ImageCache(32, directory=tmp_path / "cache")
    again.load(files[0])
    assert again.hits == 1
    temporary = ImageCache(32)
    temporary.load(files[0])
    path = temporary.path
    assert path.exists() and os.stat(path).st_mode & 0o077 == 0  # patients' pictures
    del temporary
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_its_own_file_position_and_does_not_clean_up(files: list[Path]) -> None:
    cache = ImageCache(32)
    cache.load(files[0])
    position = os.lseek(cache._file or 0, 0, os.SEEK_CUR)
    child = os.fork()
    if child == 0:
        for file in files:
            cache.load(file)
        cache._finalizer()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.lseek(cache._file or 0, 0, os.SEEK_CUR) == position
    assert cache.path.exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    (tmp_path / f"emrrg-images-{process.pid}-x.cache").write_bytes(b"left")
    (tmp_path / f"emrrg-images-{os.getpid()}-x.cache").write_bytes(b"in use")
    (tmp_path / "other.cache").write_bytes(b"not ours")
    cache = ImageCache(32)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {cache.path.name, f"emrrg-images-{os.getpid()}-x.cache", "other.cache"}


class Pictures(Dataset[tuple[int, int, int]]):
    """Gives each image's sum, and whether it had to be decoded."""

    def __init__(self, cache: ImageCache, files: list[Path]) -> None:
        self.cache, self.files = cache, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        before = self.cache.misses
        pixels = self.cache.load(self.files[index])
        return index, int(pixels.sum()), self.cache.misses - before


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_worker_processes_share_it_across_epochs(method: str, files: list[Path]) -> None:
    if method == "forkserver":
        pytest.skip("as spawn: the data set is pickled")
    cache = ImageCache(32)
    dataset = Pictures(cache, files)
    assert pickle.loads(pickle.dumps(cache)).path == cache.path
    expected = {k: int(load_image(f, 32).sum()) for k, f in enumerate(files)}
    decoded = []
    for _ in range(2):
        loader = DataLoader(
            dataset, batch_size=None, num_workers=2, multiprocessing_context=method
        )  # new workers each time, as a training loop makes them
        rows = list(loader)
        assert {k: total for k, total, _ in rows} == expected
        decoded.append(sum(missed for _, _, missed in rows))
    assert decoded == [12, 0]
    assert cache.path.exists()  # a worker's end does not remove it
