"""Samples are functions of the seed and the image's index alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from toys import GaussianFlow
from worker_toys import run_config

from mixflow_core.correctives import SamplingCorrective
from mixflow_core.rng import generator
from mixflow_core.samplers import Sampler
from workers.data import to_pixels
from workers.models.sit import SiT
from workers.sample import SampleSet, grid_png, read_part, sample_batch, start_noise, write_part

CPU = torch.device("cpu")
SAMPLERS = {
    "euler": (Sampler("euler", 8, guidance_scale=1.5), 16),
    "heun": (Sampler("heun", 10), 20),
    "sde": (Sampler("sde", 20), 20),
}


class Counting(nn.Module):
    """A network that records the rows and labels of every call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x, t, y):
        self.calls.append(y.tolist())
        return self.model(x, t, y)


@pytest.fixture(scope="module")
def model():
    found = SiT(run_config().model)
    numbers = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=numbers))
    return found


@pytest.mark.parametrize("kind", SAMPLERS)
def test_batches_do_not_depend_on_their_order_or_company(model, kind):
    run, what = run_config(), SampleSet(SAMPLERS[kind][0], num_samples=11, batch_size=4, seed=3)
    assert what.num_batches == 3
    forwards = [sample_batch(model, run, what, number, CPU) for number in range(3)]
    backwards = [sample_batch(model, run, what, number, CPU) for number in (2, 1, 0)][::-1]
    torch.manual_seed(99)
    alone = sample_batch(model, run, what, 1, CPU)
    for a, b in zip([*forwards, forwards[1]], [*backwards, alone], strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
    assert [len(batch.pixels) for batch in forwards] == [4, 4, 3]
    together = torch.cat([batch.pixels for batch in forwards])
    assert len({image.numpy().tobytes() for image in together}) == 11
    assert together.dtype == torch.uint8


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_larger_set_begins_with_the_smaller_one(model, kind):
    run, sampler = run_config(), SAMPLERS[kind][0]
    few, many = (SampleSet(sampler, num_samples=n, batch_size=4, seed=3) for n in (8, 16))
    for number in (0, 1):
        a, b = (sample_batch(model, run, what, number, CPU) for what in (few, many))
        assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_evaluations_are_counted(model, kind):
    sampler, nfe = SAMPLERS[kind]
    counting, what = Counting(model), SampleSet(sampler, num_samples=4, batch_size=4, seed=3)
    assert sample_batch(counting, run_config(), what, 0, CPU).nfe == nfe
    rows = sum(len(labels) for labels in counting.calls)
    assert rows == nfe * 4, "one evaluation a row"


def test_guidance_mixes_the_labelled_with_the_null_prediction(model):
    """One Euler step by hand: x0 + v_u + s (v_c - v_u)."""
    run, what = run_config(), SampleSet(Sampler("euler", 1, guidance_scale=1.5), num_samples=4, batch_size=4, seed=3)
    found = sample_batch(model, run, what, 0, CPU)
    x0, t, labels = start_noise(run, 3, range(4)), torch.zeros(4), torch.arange(4)
    with torch.no_grad():
        given, none = model(x0, t, labels), model(x0, t, torch.full((4,), 10))
    difference = found.pixels.int() - to_pixels(x0 + none + 1.5 * (given - none)).int()
    assert difference.abs().max() <= 1  # rounding to a pixel value may go either way
    assert not torch.equal(found.pixels, to_pixels(x0 + given))


def test_arms_share_their_starting_noise():
    arms = [run_config(seed=1), run_config(seed=2, steps=9)]
    a, b = (start_noise(run, 5, range(3, 9)) for run in arms)
    assert torch.equal(a, b)
    assert torch.equal(start_noise(arms[0], 5, range(6, 7))[0], a[3])
    assert not torch.equal(start_noise(arms[0], 6, range(3, 9)), a)
    assert torch.equal(a[0], torch.randn(1, 8, 8, generator=generator(5, "sample_noise", 3)))
    many = start_noise(arms[0], 0, range(500))
    assert abs(many.mean().item()) < 4 / 32000**0.5
    assert abs(many.var().item() - 1) < 4 * (2 / 32000) ** 0.5


def test_the_sde_takes_each_images_own_noise():
    """By hand for a field of zero, whose drift on the linear path is -x: x (1 - h) + sqrt(2 (1 - t) h) z."""

    class Still(nn.Module):
        def forward(self, x, t, y):
            return torch.zeros_like(x)

    run, what = run_config(), SampleSet(Sampler("sde", 4), num_samples=6, batch_size=3, seed=8)
    found = sample_batch(Still(), run, what, 1, CPU).pixels
    for place, index in enumerate(range(3, 6)):
        x, numbers, h = start_noise(run, 8, range(index, index + 1))[0], generator(8, "sde_noise", index), 0.96 / 3
        for step in range(3):
            z = torch.randn(1, 8, 8, generator=numbers)
            x = x * (1 - h) + (2 * (1 - step * h) * h) ** 0.5 * z
        expected = to_pixels(x * (1 - 0.04))
        assert (found[place].int() - expected.int()).abs().max() <= 1


def test_labels_are_as_many_of_each_class():
    run, what = run_config(), SampleSet(Sampler("euler", 1), num_samples=37, batch_size=8, seed=0)
    model = SiT(run.model).initialise(0)
    batches = [sample_batch(model, run, what, number, CPU) for number in range(what.num_batches)]
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert labels == [i % 10 for i in range(37)]
    assert set(Counter(labels).values()) == {3, 4}


@pytest.mark.parametrize(("kind", "tolerance"), [("euler", 0.03), ("heun", 0.01), ("sde", 0.06)])
def test_the_error_free_field_gives_the_data(kind, tolerance):
    """Data N(0.2, 0.1^2): mean and spread of samples drawn with the exact field, at 40 steps."""
    flow = GaussianFlow("linear", 0.2, 0.1)

    class Exact(nn.Module):
        def forward(self, x, t, y):
            return flow.field(x, t)

    what = SampleSet(Sampler(kind, 40), num_samples=200, batch_size=200, seed=1)
    values = sample_batch(Exact(), run_config(), what, 0, CPU).pixels.double() / 127.5 - 1
    assert values.mean().item() == pytest.approx(0.2, abs=0.01)
    assert values.std().item() == pytest.approx(0.1, abs=tolerance)


def test_guidance_needs_a_null_label():
    run = run_config(model={"class_dropout_prob": 0.0})
    model = SiT(run.model).initialise(0)
    guided = SampleSet(Sampler("euler", 2, guidance_scale=2.0), num_samples=2, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 .*no null label"):
        sample_batch(model, run, guided, 0, CPU)
    plain = SampleSet(Sampler("euler", 2), num_samples=2, batch_size=2, seed=0)
    assert sample_batch(model, run, plain, 0, CPU).nfe == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_reads_back(tmp_path, channels):
    import numpy as np
    from PIL import Image

    images = torch.randint(0, 256, (7, channels, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid_png(images, str(tmp_path / "grid.png"), columns=3, enlarge=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[:2] == (3 * 4 * 2, 3 * 5 * 2)
    small = sheet[::2, ::2].reshape(12, 15, channels)
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        cell = small[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        assert np.array_equal(cell.transpose(2, 0, 1), image.numpy())
    assert not small[8:, 5:].any()


def test_samples_that_are_not_finite_are_refused(model):
    model = copy.deepcopy(model)  # shared with the other tests
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    what = SampleSet(SAMPLERS["euler"][0], num_samples=4, batch_size=4, seed=3)
    with pytest.raises(FloatingPointError, match="samples must be finite, but image 0 of euler"):
        sample_batch(model, run_config(), what, 0, CPU)


def test_random_labels_are_functions_of_seed_and_index():
    what = SampleSet(Sampler("euler", 1), num_samples=3000, batch_size=100, seed=5, label_law="random")
    labels = what.labels(range(3000), 10)
    assert torch.equal(torch.cat([what.labels(what.indices(number), 10) for number in range(30)]), labels)
    # Pearson's statistic of a fair draw of 10 classes has 9 degrees of freedom: above 27.9 once in a thousand seeds.
    counts = labels.bincount(minlength=10).double()
    assert len(counts) == 10
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9
    other = SampleSet(Sampler("euler", 1), num_samples=3000, batch_size=100, seed=6, label_law="random")
    assert not torch.equal(other.labels(range(3000), 10), labels)
    equal = SampleSet(Sampler("euler", 1), num_samples=3000, batch_size=100, seed=5)
    assert equal.labels(range(25), 10).tolist() == [*range(10), *range(10), *range(5)]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "image_bytes", "lengths"),
    [
        (2000, 250, 64, [4, 4]),  # 1,000 images
        (2100, 250, 64, [4, 4, 1]),
        (500, 50, 3 * 512**2, [1] * 10),  # 64 MiB hold 85 images
        (100, 1500, 64, [1]),  # a batch is never cut
    ],
)
def test_parts_are_whole_batches_of_a_bounded_size(num_samples, batch_size, image_bytes, lengths):
    what = SampleSet(Sampler("euler", 1), num_samples=num_samples, batch_size=batch_size, seed=0)
    parts = what.parts(image_bytes)
    assert [len(part) for part in parts] == lengths
    assert [number for part in parts for number in part] == list(range(what.num_batches))
    assert [what.num_images(part) for part in parts] == [sum(len(what.indices(n)) for n in part) for part in parts]


def test_parts_are_read_as_they_were_written(tmp_path):
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 3, 4, 4), generator=numbers, dtype=torch.uint8)
    labels = torch.arange(7) * 3
    write_part(tmp_path / "a.parquet", pixels, labels)
    write_part(tmp_path / "b.parquet", pixels.clone(), labels)
    found = read_part(tmp_path / "a.parquet")
    assert torch.equal(found[0], pixels)
    assert torch.equal(found[1], labels)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"b.parquet must be a Parquet file of images and labels; "):
        read_part(tmp_path / "b.parquet")


def test_a_corrective_changes_what_is_sampled_and_none_does_not(model):
    run, sampler = run_config(), Sampler("euler", 4)
    plain = SampleSet(sampler, num_samples=4, batch_size=4, seed=3)
    scaled = SampleSet(sampler, num_samples=4, batch_size=4, seed=3, corrective=SamplingCorrective(epsilon_scale=1.5))
    off = SampleSet(sampler, num_samples=4, batch_size=4, seed=3, corrective=SamplingCorrective())
    found = [sample_batch(model, run, what, 0, CPU, decode=lambda x: x).pixels for what in (plain, off, scaled)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
