"""Our FID-Inception beside torch-fidelity's, with the same random weights in one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peer import PeerInception
from toys import GOLDEN, inception_weights, published_keys, recipe_pixels

from workers.inception import load_inception

OUTPUTS = ("pooled", "spatial", "logits")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_weights(7), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_golden_names_are_those_of_the_class(file):
    state = PeerInception(file).net.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published_keys("inception")


def test_the_golden_values_are_those_of_the_class(file):
    truth = json.loads((GOLDEN / "inception.json").read_text())
    assert truth["seed"] == 7
    found = PeerInception(file)(recipe_pixels(tuple(truth["shape"]), 7))
    for name, value in zip(OUTPUTS, found, strict=True):
        flat = value.flatten()[np.linspace(0, value.numel() - 1, 64).astype(int)]
        # The rounding of a CPU's convolutions, AVX2 or AVX-512: the same bound as between the two implementations.
        assert distance(flat, torch.tensor(truth[name]["values"])) < 1e-5


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 256, 256), (1, 3, 299, 299), (1, 3, 512, 300)])
def test_outputs_agree(file, shape):
    pixels = recipe_pixels(shape, 5)
    for name, ours, theirs in zip(OUTPUTS, load_inception(file)(pixels), PeerInception(file)(pixels), strict=True):
        assert ours.shape == theirs.shape
        print(f"{shape} {name}: {distance(ours, theirs):.1e} of the largest value")
        assert distance(ours, theirs) < 1e-5


def test_rounding_errors_are_of_the_size_of_theirs(file):
    """Against float64, on images that neither of them resizes: its positions would be finer than TensorFlow's."""
    pixels = recipe_pixels((2, 3, 299, 299), 6)
    nets = (load_inception(file), PeerInception(file), PeerInception(file).double())
    for name, ours, theirs, exact in zip(OUTPUTS, *(net(pixels) for net in nets), strict=True):
        errors = distance(ours, exact), distance(theirs, exact)
        print(f"{name}: ours {errors[0]:.1e}, theirs {errors[1]:.1e} of the largest value")
        assert 0 < errors[0] < 5 * errors[1]
