"""DiT-DH's start, options and shapes; its numbers are checked against the published implementation elsewhere."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mixflow_core.interpolant import Interpolant
from workers.models.ddt import DiTDH, DiTDHConfig
from workers.models.sit import drop_labels

SHAPE = {
    "input_size": 4, "in_channels": 3, "hidden_size": (16, 24), "depth": (2, 1), "num_heads": (2, 3), "num_classes": 10
}  # fmt: skip


def config(**changes) -> DiTDHConfig:
    return DiTDHConfig(**{**SHAPE, **changes})


def randomised(shape: DiTDHConfig) -> DiTDH:
    """A network no part of which is zero."""
    model, numbers = DiTDH(shape), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=numbers))
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4, 4, generator=numbers), torch.tensor([0.3, 0.6]), torch.tensor([1, 10])


@pytest.mark.parametrize("train_tables", [False, True])
def test_a_fresh_network_predicts_zero_and_learns(train_tables):
    model = DiTDH(config(train_tables=train_tables)).initialise(0)
    x, t, y = batch()
    out = model(x, t, y)
    assert out.shape == x.shape
    assert torch.equal(out, torch.zeros_like(x))
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.weight.grad.abs().sum() > 0
    assert (model.pos_embed.grad is not None) == train_tables
    assert (model.t_embedder.W.grad is not None) == train_tables


def test_the_start_is_a_function_of_the_seed():
    a, b, c = (DiTDH(config()).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    same = {name for name in a if torch.equal(a[name], c[name])}
    silent = {name for name in a if "adaLN" in name or "norm" in name or name.startswith("final_layer")}
    assert same == silent | {
        name for name in a if "rope" in name or "embedder.proj.bias" in name or name == "pos_embed"
    }


def test_the_start_follows_the_published_laws():
    state = (
        DiTDH(config(input_size=1, in_channels=64, hidden_size=(96, 120), num_classes=500)).initialise(3).state_dict()
    )

    def moments(name):
        return state[name].mean().item(), state[name].std().item()

    assert moments("t_embedder.W") == pytest.approx((0, 1), abs=0.2)
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert moments(name) == pytest.approx((0, 0.02), abs=0.001)
    for name, bound in {
        "x_embedder.proj.weight": (6 / (64 + 120)) ** 0.5,
        "s_embedder.proj.weight": (6 / (64 + 96)) ** 0.5,
        "s_projector.weight": 96**-0.5,
        "s_projector.bias": 96**-0.5,
        "t_embedder.mlp.0.bias": 512**-0.5,
        "blocks.0.attn.qkv.weight": 96**-0.5,
        "blocks.0.mlp.w3.bias": 256**-0.5,
        "blocks.2.mlp.w12.bias": 120**-0.5,
        "blocks.2.mlp.w3.weight": 320**-0.5,
    }.items():
        assert state[name].abs().max() <= bound, name
        assert state[name].abs().max() > 0.95 * bound, name
        assert moments(name) == pytest.approx((0, bound / math.sqrt(3)), abs=0.25 * bound), name
    for name, value in state.items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        if "adaLN_modulation" in name or "final_layer.linear" in name or "embedder.proj.bias" in name:
            assert not value.any(), name


def test_the_prediction_depends_on_image_time_and_label():
    model, (x, t, y) = randomised(config()), batch()
    out = model(x, t, y)
    assert not torch.allclose(model(x + 1, t, y), out, atol=1e-3)
    assert not torch.allclose(model(x, t + 0.1, y), out, atol=1e-4)
    assert not torch.allclose(model(x, t, torch.tensor([3, 4])), out, atol=1e-4)
    torch.testing.assert_close(
        model(x[:1], t[:1], y[:1]), out[:1], rtol=1e-4, atol=1e-4 * float(out.detach().abs().max())
    )


def test_a_latent_of_any_layout_gives_a_contiguous_answer():
    model, (x, t, y) = randomised(config()), batch()
    out = model(x, t, y)
    assert out.is_contiguous()
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), t, y), out)


def test_normalised_queries_and_keys_forget_their_size():
    model, (x, t, y) = randomised(config(qk_norm=True)), batch()
    out = model(x, t, y)
    with torch.no_grad():
        for block, width in zip(model.blocks, (16, 16, 24), strict=True):
            block.attn.qkv.weight[: 2 * width] *= 10
            block.attn.qkv.bias[: 2 * width] *= 10
    torch.testing.assert_close(model(x, t, y), out, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.blocks[2].attn.k_norm.weight[:] = torch.linspace(-2, 2, 8)
    assert not torch.allclose(model(x, t, y), out, atol=1e-2)
    names = [name for name in model.state_dict() if name.startswith("blocks.0.attn")]
    assert names[2:4] == ["blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"]


def test_bfloat16_follows_float32():
    model, (x, t, y) = randomised(config()), batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, y)
    out = model(x, t, y)
    assert (low.float() - out).norm() < 0.05 * out.norm()


def test_a_model_without_dropout_has_no_null_label():
    shape = config(class_dropout_prob=0.0)
    assert shape.null_label is None
    assert DiTDH(shape).y_embedder.embedding_table.weight.shape == (10, 16)
    assert drop_labels(torch.arange(10), torch.zeros(10), shape).tolist() == list(range(10))
    assert config().null_label == 10
    assert DiTDH(config()).y_embedder.embedding_table.weight.shape == (11, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 0}, "input_size must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"depth": (2, 0)}, "depth must be two numbers of at least 1, encoder and decoder, got (2, 0)"),
        ({"depth": (2,)}, "depth must be two numbers of at least 1, encoder and decoder, got (2,)"),
        ({"num_heads": (0, 3)}, "num_heads must be two numbers of at least 1, encoder and decoder, got (0, 3)"),
        ({"hidden_size": (16, 30)}, "hidden_size must be a multiple of 4 times num_heads (2, 3), got (16, 30)"),
        ({"hidden_size": (20, 24)}, "hidden_size must be a multiple of 4 times num_heads (2, 3), got (20, 24)"),
        ({"mlp_ratio": 0.05}, "mlp_ratio must leave the MLP a width, got 0.05; 4 is the published ratio"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob must lie in [0, 1), got 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match="must") as caught:
        config(**changes)
    assert str(caught.value) == message


def test_a_narrow_mlp_still_has_a_width():
    assert DiTDH(config(mlp_ratio=0.125)).blocks[0].mlp.w3.in_features == 1


@pytest.mark.parametrize("wrong", [{"patch_size": 1}, {"family": "sit"}, {"qk_norm": 1}, {"input_size": True}])
def test_a_file_with_another_key_or_type_is_refused(wrong):
    adapter = TypeAdapter(DiTDHConfig)
    assert adapter.validate_json(json.dumps(SHAPE)) == config()
    with pytest.raises(ValidationError):
        adapter.validate_json(json.dumps({**SHAPE, **wrong}))


def test_a_network_that_knows_the_published_velocity_predicts_ours():
    """The sign and the direction of time, from the path alone: RAE's velocity at s = 1 - t is noise minus data."""
    model, (x, t, y) = DiTDH(config()).initialise(0), batch()
    bias = torch.tensor([1.0, -2.0, 3.0])
    with torch.no_grad():
        model.final_layer.linear.bias.copy_(bias)
    # Data at zero and noise at `bias`: the published network would answer `bias` everywhere.
    x0, x1 = bias.view(1, 3, 1, 1).expand_as(x), torch.zeros_like(x)
    torch.testing.assert_close(model(x, t, y), Interpolant("linear").velocity(x0=x0, x1=x1, t=t))


def test_compiled_blocks_are_whole_graphs_of_real_numbers():
    """Inductor leaves complex numbers to kernels of their own, and says so."""
    model = randomised(config())
    expected = model(*batch())
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for block in model.blocks:
            block.compile(fullgraph=True)
        found = model(*batch())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not [str(warning.message) for warning in said if "complex" in str(warning.message)]
