"""Files of ADM's evaluator, against numpy's own reading and writing."""

from __future__ import annotations

import time
import tracemalloc
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.adm import AdmReference, read_images, read_reference, write_samples

NUMBERS = np.random.default_rng(7)


def covariance(size: int) -> np.ndarray:
    features = NUMBERS.standard_normal((40, size))
    return np.cov(features, rowvar=False) + 0.1 * np.eye(size)


ARRAYS = {
    "mu": NUMBERS.standard_normal(2048),
    "sigma": covariance(2048),
    "mu_s": NUMBERS.standard_normal(2023),
    "sigma_s": covariance(2023),
}
IMAGES = NUMBERS.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


def changed(**changes) -> dict[str, np.ndarray]:
    """The arrays with others in the place of some, or without those that are None."""
    return {name: array for name, array in {**ARRAYS, "arr_0": IMAGES, **changes}.items() if array is not None}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adm") / "reference.npz"
    np.savez(path, **changed(), arr_1=np.arange(7))
    return path


def refused(call, *arguments, **settings) -> str:
    """The one line with which something fails."""
    with pytest.raises(ValueError, match=r".") as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_images(path: Path, batch_size: int = 3, **settings) -> np.ndarray:
    return torch.cat(list(read_images(path, batch_size, **settings))).numpy()


def check(found: AdmReference, expected: dict[str, np.ndarray]) -> None:
    for values, name in zip(found, ("mu", "sigma", "mu_s", "sigma_s"), strict=False):
        if name not in expected:
            assert values is None
            continue
        assert values.dtype == torch.float64
        assert np.array_equal(values.numpy(), expected[name].astype(np.float64))


# ------------------------------------------------------------------------------------------------------ reading


def test_a_reference_is_what_numpy_reads(reference):
    found = read_reference(reference, image_size=16)
    check(found, ARRAYS)
    assert (found.num_images, found.image_size) == (7, 16)
    assert np.array_equal(all_images(reference, image_size=16), IMAGES.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("left_out", [("arr_0",), ("mu_s", "sigma_s"), ("arr_0", "mu_s", "sigma_s")])
def test_images_and_spatial_statistics_may_be_absent(tmp_path, left_out):
    arrays = changed(**dict.fromkeys(left_out))
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_reference(tmp_path / "a.npz", image_size=16)
    check(found, arrays)
    assert (found.num_images, found.image_size) == ((None, None) if "arr_0" in left_out else (7, 16))


def test_other_layouts_of_the_same_numbers_are_read(tmp_path):
    single = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
    single["sigma"][0, 1] *= 1 + 3e-7  # as rounding may leave it
    swapped = {**single, "sigma": np.asfortranarray(single["sigma"].astype(">f4")), "arr_0": IMAGES}
    np.savez_compressed(tmp_path / "a.npz", **swapped)
    check(read_reference(tmp_path / "a.npz"), single)
    assert np.array_equal(all_images(tmp_path / "a.npz"), IMAGES.transpose(0, 3, 1, 2))


def test_images_come_in_batches_of_plain_tensors(reference):
    batches = list(read_images(reference, 3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16)]
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    assert [len(batch) for batch in read_images(reference, 100)] == [7]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reading_holds_one_batch_in_memory(tmp_path, save):
    images = NUMBERS.integers(0, 256, (128, 128, 128, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", arr_0=images)
    tracemalloc.start()
    try:
        for number, batch in enumerate(read_images(tmp_path / "a.npz", 64)):
            assert (batch[:, :, 5, 7].numpy() == images[64 * number : 64 * number + 64, 5, 7]).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == 1
    assert peak < 4.5 * 2**20  # a batch of 3 MiB, and a few parts of 256 KiB while they are unpacked


def test_statistics_are_read_without_the_images(reference, tmp_path):
    content = bytearray(reference.read_bytes())
    place = content.index(IMAGES.tobytes())
    content[place] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    check(read_reference(tmp_path / "a.npz"), ARRAYS)
    assert "Bad CRC-32 for file 'arr_0.npy'" in refused(all_images, tmp_path / "a.npz")


# ------------------------------------------------------------------------------------------------- wrong inputs


def altered(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mu": None}, "must have the array mu, got arr_0, mu_s, sigma, sigma_s"),
        ({"sigma": None}, "must have the array sigma, got arr_0, mu, mu_s, sigma_s"),
        ({"mu_s": None}, "must have the array mu_s, got arr_0, mu, sigma, sigma_s"),
        ({"sigma_s": None}, "must have the array sigma_s, got arr_0, mu, mu_s, sigma"),
        ({"mu": ARRAYS["mu_s"]}, "mu must be floats (2048,) as the FID-Inception has them, got float64 (2023,)"),
        ({"mu": ARRAYS["mu"][None]}, "mu must be floats (2048,) as the FID-Inception has them, got float64 (1, 2048)"),
        ({"mu": np.zeros(2048, int)}, "mu must be floats (2048,) as the FID-Inception has them, got int64 (2048,)"),
        ({"sigma": ARRAYS["sigma_s"]}, "sigma must be floats (2048, 2048) as the FID-Inception has them, got float64"),
        ({"mu_s": ARRAYS["mu"]}, "mu_s must be floats (2023,) as the FID-Inception has them, got float64 (2048,)"),
        ({"sigma_s": ARRAYS["sigma"]}, "sigma_s must be floats (2023, 2023) as the FID-Inception has them, got"),
        ({"mu": np.array([None, 1])}, "mu must be numbers, got pickled objects, which are not read"),
        ({"mu": altered(ARRAYS["mu"], (5,), np.nan)}, "mu must be finite, got NaN or infinity"),
        ({"sigma_s": altered(ARRAYS["sigma_s"], (5, 6), np.inf)}, "sigma_s must be finite, got NaN or infinity"),
        ({"sigma": altered(ARRAYS["sigma"], (5, 6), 1e3)}, "sigma must be a covariance, symmetric with a diagonal of"),
        ({"sigma": altered(ARRAYS["sigma"], (5, 5), -1)}, "to its transpose and -1 on its diagonal"),
        ({"sigma": 2 * np.eye(2048) - 1}, "sigma: covariance must have no negative eigenvalue, got -2046"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 must be square images, uint8 (N, H, W, 3), got float32 (7, 16"),
        ({"arr_0": IMAGES[:, :8]}, "arr_0 must be square images, uint8 (N, H, W, 3), got uint8 (7, 8, 16, 3)"),
        ({"arr_0": IMAGES[..., :1]}, "arr_0 must be square images, uint8 (N, H, W, 3), got uint8 (7, 16, 16, 1)"),
        ({"arr_0": IMAGES[0]}, "arr_0 must be square images, uint8 (N, H, W, 3), got uint8 (16, 16, 3)"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "got uint8 (7, 16, 16, 3) in Fortran's order"),
        ({"arr_0": IMAGES[:0]}, "arr_0 must have at least one image, got (0, 16, 16, 3)"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, problem):
    np.savez(tmp_path / "a.npz", **changed(**changes))
    message = refused(read_reference, tmp_path / "a.npz")
    assert message.startswith(f"reference {tmp_path / 'a.npz'}")
    assert problem in message


def test_images_of_another_size_are_refused(reference):
    for call in (read_reference, lambda path, image_size: all_images(path, image_size=image_size)):
        assert refused(call, reference, image_size=32) == (
            f"reference {reference}: arr_0 must be images of 32 pixels as the samples are, got 16; take the reference "
            "of this resolution"
        )


def test_samples_without_statistics_have_images_alone(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    assert np.array_equal(all_images(tmp_path / "a.npz"), IMAGES.transpose(0, 3, 1, 2))
    assert refused(read_reference, tmp_path / "a.npz").endswith("must have the array mu, got arr_0")
    np.savez(tmp_path / "b.npz", **ARRAYS)
    assert refused(all_images, tmp_path / "b.npz").endswith("must have the array arr_0, got mu, mu_s, sigma, sigma_s")


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    assert refused(read_reference, path) == f"reference {path} must be a local .npz file, got none"
    for content in (b"", b"text", b"\x93NUMPY"):
        path.write_bytes(content)
        assert refused(read_reference, path).startswith(f"reference {path} must be a complete .npz file, got one that")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", b"text")
    assert refused(read_reference, path).startswith(f"reference {path}: mu must be an array in numpy's format; ")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(reference, tmp_path, share):
    content = reference.read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(share * len(content))])
    message = refused(read_reference, tmp_path / "a.npz")
    assert message.startswith(f"reference {tmp_path / 'a.npz'} must be a complete .npz file, got one that is not: ")


def test_altered_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=ARRAYS["mu"], sigma=ARRAYS["sigma"])
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "Bad CRC-32 for file 'sigma.npy'" in refused(read_reference, tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_altered_byte_gives_other_images(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, arr_0=IMAGES[:2, :4, :4])
    content, messages = path.read_bytes(), []
    for place in range(len(content)):
        altered_content = bytearray(content)
        altered_content[place] ^= 0xFF
        path.write_bytes(altered_content)
        try:
            assert np.array_equal(all_images(path), IMAGES[:2, :4, :4].transpose(0, 3, 1, 2))
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"reference {path}") and "\n" not in message for message in messages)
    assert len(messages) > 150  # of some 450 bytes; the others are times, versions and the like


def test_a_directory_that_promises_more_than_there_is_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(92))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24  # the unpacked size
    size = int.from_bytes(content[place : place + 4], "little")
    content[place : place + 4] = (size + 4).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(content)
    assert refused(all_images, tmp_path / "a.npz").endswith("got one that is not: 4 bytes are missing")


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    message = refused(all_images, tmp_path / "a.npz")
    assert message.endswith("arr_0 must have 196608000000000 bytes for (1000000000, 256, 256, 3), got 100")


# ------------------------------------------------------------------------------------------------------ writing


def batches(images: np.ndarray, size: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).split(size))


def test_numpy_reads_the_samples_and_can_map_them(tmp_path):
    path = tmp_path / "a.npz"
    write_samples(path, iter(batches(IMAGES, 3)), IMAGES.shape)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], IMAGES)
    start = path.read_bytes().index(IMAGES.tobytes())  # uncompressed, in one piece
    assert np.array_equal(np.memmap(path, np.uint8, "r", start, IMAGES.shape), IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_the_evaluators_way_of_reading_streams_the_samples(tmp_path):
    """It streams the formats 1.0 and 2.0 in C order, and takes what else there is into memory at once."""
    write_samples(tmp_path / "a.npz", batches(IMAGES, 3), IMAGES.shape)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (IMAGES.shape, False, np.dtype("uint8"))
        assert file.read() == IMAGES.tobytes()
    assert (tmp_path / "a.npz").read_bytes()[4] == 45  # the version with ZIP64: others end at 2 GiB


def test_the_same_images_give_the_same_file(tmp_path, monkeypatch):
    write_samples(tmp_path / "a.npz", batches(IMAGES, 3), IMAGES.shape)
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2031, 5, 6, 7, 8, 9, 1, 126, 0)))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_samples(tmp_path / "b.npz", batches(IMAGES, 2), IMAGES.shape)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_writing_holds_one_batch_and_shows_no_half_file(tmp_path):
    """Each batch is on disk and forgotten when the next one is asked for."""
    path, alive, sizes = tmp_path / "a.npz", [], []

    def stream():
        for _ in range(8):
            batch = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert not path.exists()
            (file,) = tmp_path.iterdir()
            sizes.append(file.stat().st_size)
            assert sum(ref() is not None for ref in alive) <= 1

    write_samples(path, stream(), (32, 128, 128, 3))
    assert all(size >= number * 4 * 128 * 128 * 3 for number, size in enumerate(sizes))
    assert all_images(path).shape == (32, 3, 128, 128)


@pytest.mark.parametrize(
    ("found", "shape", "problem"),
    [
        (batches(IMAGES, 3), (8, 16, 16, 3), "batches must hold 8 images altogether, got 7"),
        (batches(IMAGES, 3), (5, 16, 16, 3), "batches must hold 5 images altogether, got at least 6"),
        ([], (5, 16, 16, 3), "batches must hold 5 images altogether, got 0"),
        (batches(IMAGES, 3), (7, 16, 8, 3), "batches must be torch.uint8 (B, 3, 16, 8), got torch.uint8 (3, "),
        ([torch.zeros(7, 3, 16, 16)], (7, 16, 16, 3), "got torch.float32 (7, 3, 16, 16)"),
        ([], (0, 16, 16, 3), "shape must be (N, H, W, 3) with at least one image, got (0, 16, 16, 3)"),
        ([], (7, 3, 16, 16), "shape must be (N, H, W, 3) with at least one image, got (7, 3, 16, 16)"),
        ([], (7, 16, 3), "shape must be (N, H, W, 3) with at least one image, got (7, 16, 3)"),
    ],
)  # fmt: skip
def test_a_failed_write_leaves_what_was_there(tmp_path, found, shape, problem):
    path = tmp_path / "a.npz"
    path.write_bytes(b"before")
    assert problem in refused(write_samples, path, found, shape)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert path.read_bytes() == b"before"
