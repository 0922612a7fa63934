"""The FID-Inception: names of the published file, outputs of a published implementation, refusal of other files."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from toys import GOLDEN, inception_weights, normals, published_keys, recipe_pixels

from workers.inception import FIDInception, load_inception, resize_as_tensorflow

SEED = json.loads((GOLDEN / "inception.json").read_text())["seed"]


@pytest.fixture(scope="module")
def weights():
    return inception_weights(SEED)


@pytest.fixture(scope="module")
def net(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)  # the published file is as old as that
    return load_inception(path)


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        found = {name: list(value.shape) for name, value in FIDInception().state_dict().items()}
    assert found == published_keys("inception")
    assert len(found) == 94 * 6 + 2


def test_outputs_are_those_of_the_published_implementation(net):
    truth = json.loads((GOLDEN / "inception.json").read_text())
    found = net(recipe_pixels(tuple(truth["shape"]), SEED))
    for name, dimension in (("pooled", 2048), ("spatial", 2023), ("logits", 1008)):
        value, expected = getattr(found, name), truth[name]
        assert list(value.shape) == expected["shape"] == [2, dimension]
        assert value.dtype == torch.float32
        stats = [float(value.double().mean()), float(value.double().std())]
        np.testing.assert_allclose(stats, [expected["mean"], expected["std"]], rtol=1e-5, atol=1e-6)
        flat = value.flatten()[np.linspace(0, value.numel() - 1, 64).astype(int)]
        torch.testing.assert_close(flat, torch.tensor(expected["values"]), rtol=1e-5, atol=1e-5)


def test_merged_normalisations_change_nothing_but_rounding(net, weights):
    plain = FIDInception().eval()
    plain.load_state_dict(weights)
    pixels = recipe_pixels((1, 3, 75, 299), 1)
    with torch.no_grad():
        for a, b in zip(net(pixels), plain(pixels), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_repeats_bit_for_bit_and_is_for_inference(net):
    pixels = recipe_pixels((2, 3, 32, 32), 2)
    first, again = net(pixels), net(pixels)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not net.training
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()), "merged, which is faster"
    assert not any(value.requires_grad for value in (*net.parameters(), *first))
    for alone, both in zip(net(pixels[1:]), first, strict=True):
        torch.testing.assert_close(alone, both[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_pixels_of_another_kind_are_refused(net, pixels):
    wanted = f"pixels must be torch.uint8 (B, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        net(pixels)


# Resizing


def tensorflow_pixel(image, side, row, column):
    """One output value by TensorFlow 1's rule, in scalar float32 arithmetic; image (H, W) float32."""
    corners, shares = [], []
    for length, place in zip(image.shape, (row, column), strict=True):
        source = np.float32(place) * (np.float32(length) / np.float32(side))
        low = math.floor(source)
        corners.append((low, min(low + 1, length - 1)))
        shares.append(source - np.float32(low))
    (top, bottom), (left, right) = corners
    above = image[top, left] + (image[top, right] - image[top, left]) * shares[1]
    below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * shares[1]
    return above + (below - above) * shares[0]


@pytest.mark.parametrize(("height", "width", "side"), [(32, 48, 299), (512, 300, 299), (1, 5, 13), (299, 256, 299)])
def test_resizing_is_tensorflows_bit_for_bit(height, width, side):
    images = recipe_pixels((2, 3, height, width), 3).float()
    found = resize_as_tensorflow(images, side).numpy()
    assert found.shape == (2, 3, side, side)
    places = [*np.random.default_rng(0).integers(0, side, (200, 2)).tolist(), [side - 1, side - 1], [0, side - 1]]
    for n, channel in ((0, 2), (1, 0)):
        image = images[n, channel].numpy()
        expected = [tensorflow_pixel(image, side, *place) for place in places]
        assert [found[n, channel, row, column] for row, column in places] == expected


def test_resizing_has_no_half_pixel_centres():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    expected = [[1, 1.5, 2, 2], [2, 2.5, 3, 3], [3, 3.5, 4, 4], [3, 3.5, 4, 4]]
    assert resize_as_tensorflow(image, 4)[0, 0].tolist() == expected


def test_images_of_299_pixels_are_not_resized():
    images = normals(1, 1, 3, 299, 299)
    assert resize_as_tensorflow(images, 299) is images


# Files


def test_a_newer_file_without_counts_of_batches_is_read(tmp_path, weights, net):
    path = tmp_path / "converted.pth"
    torch.save({name: value for name, value in weights.items() if "num_batches" not in name}, path)
    state = torch.random.get_rng_state()
    again = load_inception(path)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws nothing"
    pixels = recipe_pixels((1, 3, 20, 20), 4)
    assert all(torch.equal(a, b) for a, b in zip(again(pixels), net(pixels), strict=True))


VARIANCES = "Mixed_6d.branch1x1.bn.running_var"


def ones(**changes):
    """The published names and shapes, filled with ones."""
    weights = {name: torch.ones(shape) for name, shape in published_keys("inception").items()}
    return {name: value for name, value in {**weights, **changes}.items() if value is not None}


def test_a_file_of_ones_is_sound(tmp_path):
    torch.save(ones(), tmp_path / "ones.pth")
    assert isinstance(load_inception(tmp_path / "ones.pth"), FIDInception)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fc.weight": None}, "fc.weight is missing (1 in all)"),
        ({"AuxLogits.fc.bias": torch.ones(3)}, "AuxLogits.fc.bias is not part of it (1 in all)"),
        ({"fc.weight": torch.ones(1000, 2048)}, "fc.weight has shape (1000, 2048) instead of (1008, 2048)"),
        ({VARIANCES: torch.ones(192).log().log()}, f"{VARIANCES} holds numbers that are not finite"),
    ],
)
def test_other_weights_are_refused_in_one_line(tmp_path, changes, problem):
    assert_refused(tmp_path / "other.pth", ones(**changes), problem)


def test_another_network_is_refused_in_one_line(tmp_path):
    assert_refused(
        tmp_path / "other.pth", {"pos_embed": torch.zeros(2)}, "Conv2d_1a_3x3.bn.bias is missing (472 in all)"
    )


def assert_refused(path, content, problem):
    torch.save(content, path)
    wanted = re.escape(f"other.pth must hold the FID-Inception's weights, but {problem}; get ")
    with pytest.raises(ValueError, match=f"^{wanted}") as caught:
        load_inception(path)
    assert_tells_where(caught)


def assert_tells_where(caught):
    message = str(caught.value)
    assert "\n" not in message
    for part in ("pt_inception-2015-12-05-6726825d.pth", "6726825d", "mseitzer/pytorch-fid", "toshas/torch-fidelity"):
        assert part in message


class Code:
    def __reduce__(self):
        return print, ("code of a file was run",)


def damaged(how, path, old):
    """Writes a file that cannot be read; old in the format of before torch 1.6."""
    torch.save({"a": Code()} if how == "code" else ones(), path, _use_new_zipfile_serialization=not old)
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[:-1000])
    elif how == "altered":
        content[content.index(bytes(torch.ones(1).numpy()))] ^= 255  # a digit of the first tensor
        path.write_bytes(content)
    elif how == "garbage":
        path.write_bytes(b"<html>not found</html>")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("how", "old"),
    # Old files have no checksums: that they are as published is for the caller to check by the SHA-256.
    [("cut", True), ("cut", False), ("altered", False), ("garbage", False), ("code", True), ("code", False)],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, how, old, capsys):
    path = tmp_path / "file.pth"
    damaged(how, path, old)
    with pytest.raises(ValueError, match=r"^checkpoint file\.pth must") as caught:
        load_inception(path)
    assert_tells_where(caught)
    assert "was run" not in capsys.readouterr().out


def test_what_is_no_file_is_refused_in_one_line(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError, match=f"^inception weights must be a local file, got {path}, which") as caught:
            load_inception(path)
        assert_tells_where(caught)
