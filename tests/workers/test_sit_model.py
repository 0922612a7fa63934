"""The network's shapes, start and labels; its numbers are checked against the published implementation elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from worker_toys import MODEL

from workers.models.sit import SiT, SiTConfig, drop_labels


def config(**changes) -> SiTConfig:
    return SiTConfig(**{**MODEL, **changes})


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_unpatchify_puts_every_patch_where_it_was_cut(learn_sigma):
    shape = config(in_channels=3, input_size=12, patch_size=4, learn_sigma=learn_sigma)
    model = SiT(shape)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((2, 3, 12, 12), 99.0)
    full = torch.cat([x, sigma], 1) if learn_sigma else x
    tokens = torch.stack(
        [
            # Within a patch the published layout runs over rows, columns, then channels.
            torch.stack(
                [full[:, c, 4 * i + a, 4 * j + b] for a in range(4) for b in range(4) for c in range(full.shape[1])]
            )
            for i in range(3)
            for j in range(3)
        ]
    ).permute(2, 0, 1)
    assert torch.equal(model._unpatchify(tokens), x)


def test_tokens_are_cut_row_by_row():
    model = SiT(config(in_channels=2)).initialise(0)
    x = torch.zeros(1, 2, 8, 8)
    x[0, :, 0:4, 4:8] = 1.0  # the second of 2 x 2 patches
    changed = (model.x_embedder(x) != model.x_embedder(torch.zeros_like(x))).any(2)[0]
    assert changed.tolist() == [False, True, False, False]


def test_a_fresh_network_predicts_zero_and_learns():
    model = SiT(config()).initialise(0)
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, 10])
    out = model(x, t, y)
    assert out.shape == x.shape
    assert torch.equal(out, torch.zeros_like(x))
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.weight.grad.abs().sum() > 0
    assert model.pos_embed.grad is None


def test_the_start_is_a_function_of_the_seed():
    a, b, c = (SiT(config()).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["x_embedder.proj.weight"], c["x_embedder.proj.weight"])
    assert a["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    bound = (6 / (16 + 64)) ** 0.5
    weight = a["blocks.0.mlp.fc1.weight"]
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_prediction_depends_on_image_time_and_label():
    model = SiT(config())
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=numbers))
    x, t, y = torch.randn(2, 1, 8, 8, generator=numbers), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    out = model(x, t, y)
    assert not torch.allclose(model(x + 1, t, y), out, atol=1e-3)
    assert not torch.allclose(model(x, t + 0.1, y), out, atol=1e-4)
    assert not torch.allclose(model(x, t, torch.tensor([3, 4])), out, atol=1e-4)
    torch.testing.assert_close(model(x[:1], t[:1], y[:1]), out[:1])


def test_labels_are_dropped_below_the_threshold():
    y, shape = torch.arange(10), config(class_dropout_prob=0.25)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9, 0.1, 0.5, 0.6, 0.24, 0.26, 0.99])
    assert drop_labels(y, u, shape).tolist() == [10, 10, 2, 3, 10, 5, 6, 10, 8, 9]
    many = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    share = (drop_labels(torch.zeros(100_000, dtype=torch.long), many, shape) == 10).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.006)  # four standard errors


def test_a_model_without_dropout_has_no_null_label():
    shape = config(class_dropout_prob=0.0)
    assert shape.null_label is None
    assert SiT(shape).y_embedder.embedding_table.weight.shape == (10, 16)
    assert drop_labels(torch.arange(10), torch.zeros(10), shape).tolist() == list(range(10))
    assert config().null_label == 10
    assert SiT(config()).y_embedder.embedding_table.weight.shape == (11, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 10}, "input_size must be a multiple of patch_size 4, got 10"),
        ({"hidden_size": 18}, "hidden_size must be a multiple of 4 and of num_heads 2, got 18"),
        ({"num_heads": 3}, "hidden_size must be a multiple of 4 and of num_heads 3, got 16"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"patch_size": -1}, "patch_size must be at least 1, got -1"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob must lie in [0, 1), got 1.0"),
        ({"class_dropout_prob": -0.1}, "class_dropout_prob must lie in [0, 1), got -0.1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match="must") as caught:
        config(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes_have_their_number_of_parameters(size, millions):
    """The counts stated in SiT's paper, table 1."""
    with torch.device("meta"):
        model = SiT(SiTConfig.published(size))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(count / 1e6) == pytest.approx(millions, abs=1)
    assert dataclasses.asdict(model.config)["input_size"] == 32
    assert SiTConfig.published(size, image_size=512).input_size == 64
