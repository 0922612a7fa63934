"""The adapter of Stable Diffusion 3.5 beside diffusers' own classes: time, velocity, names, captions, LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from tiny_sd3 import batch, captions, config, gradients_of_half, lora, randomise, sd3, theirs
from torch import nn

from mixflow_core.guidance import classifier_free
from mixflow_core.samplers import euler, final
from workers.models.sd3 import SD3, SD3Config, full_weights, is_adapter

# ------------------------------------------------------------------------------------------------ time and velocity


def test_noise_is_their_1000_and_the_velocity_points_the_other_way():
    model, (x, _, y) = sd3(), batch()
    text, pooled = (torch.from_numpy(table) for table in captions(model.config))
    told = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = theirs(model)(
        hidden_states=x,
        timestep=torch.tensor([1000.0, 750.0, 500.0, 0.0]),
        encoder_hidden_states=text[[0, 1, 2, 3]],
        pooled_projections=pooled[[0, 1, 2, 3]],
    ).sample
    assert expected.std() > 0.1
    assert torch.equal(model(x, told, y), -expected)


def test_a_guided_euler_trajectory_is_their_pipelines():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model, (x, _, _) = sd3(), batch(size=2)
    text, pooled = (torch.from_numpy(table) for table in captions(model.config))
    pipeline = StableDiffusion3Pipeline(
        transformer=theirs(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")),
    )
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompt_embeds=text[[2, 0]],
        pooled_prompt_embeds=pooled[[2, 0]],
        negative_prompt_embeds=text[[3, 3]],
        negative_pooled_prompt_embeds=pooled[[3, 3]],
        guidance_scale=2.5,
        num_inference_steps=6,
        height=64,
        width=64,
        latents=x,
        output_type="latent",
    ).images
    grid = 1 - pipeline.scheduler.sigmas
    assert (grid[0], grid[-1], len(grid)) == (0, 1, 7)
    field = classifier_free(model, torch.tensor([2, 0]), guidance_scale=2.5, null_label=model.config.null_label)
    with torch.no_grad():
        ours = final(euler(field, x, grid))
    assert (found - x).abs().mean() > 0.5
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-4)


def test_mixed_precision_stays_near():
    model, inputs = sd3(), batch()
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    error = (rough - exact).norm() / exact.norm()
    assert 0 < error < 0.05


# --------------------------------------------------------------------------------------------------- names and start


def test_names_are_diffusers_own_both_ways():
    model, inputs = sd3(), batch()
    transformer = theirs(model)
    assert list(model.state_dict()) == list(transformer.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in transformer.named_parameters()]
    assert "pos_embed.pos_embed" in dict(model.named_buffers())
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = SD3(model.config)
    other.set_captions(*captions(model.config))
    other.load_state_dict(transformer.state_dict(), strict=True)
    assert torch.equal(other(*inputs), model(*inputs))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_start_is_a_function_of_the_seed_and_of_nothing_else(lora_rank):
    before = torch.get_rng_state()
    a, b, c = (SD3(config(lora_rank=lora_rank)).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    weight = "transformer_blocks.0.ff.net.0.proj.weight"
    assert not torch.equal(a[weight], c[weight])
    bound = (6 / (16 + 64)) ** 0.5
    assert 0.9 * bound < a[weight].abs().max() <= bound
    whole = SD3(config()).initialise(1).state_dict()
    assert all(torch.equal(a.get(name.replace(".weight", ".base_layer.weight"), a.get(name)), whole[name])
               for name in whole if name.endswith(".weight"))  # fmt: skip


def test_a_fresh_network_predicts_zero_and_learns():
    model = SD3(config()).initialise(0)
    model.set_captions(*captions(model.config))
    out = model(*batch())
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().sum().backward()
    assert model.proj_out.weight.grad is not None
    randomise(model, 0)
    model.zero_grad()
    model(*batch()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------- captions


def test_captions_are_looked_up_by_row_and_the_last_is_the_empty_one(tmp_path):
    model, (x, t, _) = sd3(), batch(size=1)
    text, pooled = captions(model.config, seed=5)
    np.save(tmp_path / "text.npy", text.astype(np.float16))
    stored = np.load(tmp_path / "text.npy", mmap_mode="r")
    model.set_captions(stored, pooled.astype(np.float16))
    outputs = [model(x, t, torch.tensor([row])) for row in (0, 1, 2, model.config.null_label)]
    for row, out in enumerate(outputs):
        alone = sd3(num_classes=1)
        alone.load_state_dict(model.state_dict())
        rows = [row, row]
        alone.set_captions(stored[rows].astype(np.float32), pooled.astype(np.float16)[rows].astype(np.float32))
        assert torch.equal(alone(x, t, torch.tensor([0])), out)
        assert out.dtype == torch.float32
    assert all(not torch.allclose(outputs[i], outputs[j], atol=1e-3) for i in range(4) for j in range(i))


def test_the_captions_of_one_batch_are_read_once_and_those_of_another_anew():
    class Counted(np.ndarray):
        reads = 0

        def __getitem__(self, rows):
            Counted.reads += 1
            return np.asarray(self)[rows]

    model, (x, t, y) = sd3(), batch()
    text, pooled = captions(model.config, seed=5)
    model.set_captions(text.view(Counted), pooled)
    first, again = model(x, t, y), model(x, t, y)
    assert torch.equal(first, again)
    assert Counted.reads == 1
    other = (y + 1) % 3
    assert not torch.allclose(model(x, t, other), first, atol=1e-3)
    assert Counted.reads == 2
    model.set_captions(text[::-1].copy(), pooled)
    assert not torch.allclose(model(x, t, y), first, atol=1e-3), "other captions, the same numbers"


def test_missing_or_foreign_captions_are_refused():
    x, t, y = batch()
    with pytest.raises(ValueError, match="captions must be set before the network is called, got none"):
        SD3(config())(x, t, y)
    text, pooled = captions(config())
    model = SD3(config())
    with pytest.raises(ValueError, match=r"caption text must have shape \(4, any, 40\), got \(3, 5, 40\)"):
        model.set_captions(text[:3], pooled)
    with pytest.raises(ValueError, match=r"caption pooled must have shape \(4, 20\), got \(4, 19\)"):
        model.set_captions(text, pooled[:, :19])
    model.set_captions(text, pooled)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"y must lie in \[0, 3\]"):
            model(x[:1], t[:1], torch.tensor([wrong]))


# -------------------------------------------------------------------------------------------------------------- LoRA


def test_adapters_sit_on_every_linear_layer_of_every_attention_and_change_nothing_at_first():
    whole, model, inputs = sd3(), sd3(lora_rank=2), batch()
    assert torch.equal(model(*inputs), whole(*inputs))
    linear = {name for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    adapted = {name.split(".lora_A.")[0] for name in model.state_dict() if ".lora_A." in name}
    assert adapted == {name for name in linear if ".attn." in name or ".attn2." in name}
    assert any(".attn2." in name for name in adapted)


def test_only_adapters_train():
    model, inputs = sd3(lora_rank=2), batch()
    before = copy.deepcopy(model.state_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name in model.state_dict() if is_adapter(name)}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (model(*inputs) - 1).square().mean().backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= set(trained)
    # The last block's text output is dropped, so nothing can be learnt from it.
    idle = {name for name in trained if "blocks.2.attn.add_q_proj.lora_B" in name}
    assert changed == set(trained) - idle


def test_merging_adapters_changes_nothing():
    model, inputs = lora(), batch()
    merged = sd3()
    without = merged(*inputs)
    merged.load_state_dict(full_weights(model.config, model.state_dict()))
    out = model(*inputs)
    assert (out - without).abs().mean() > 0.05
    torch.testing.assert_close(merged(*inputs), out, rtol=1e-4, atol=1e-5)
    plain = merged.state_dict()
    assert full_weights(merged.config, plain).keys() == plain.keys()


def test_a_state_is_restored_exactly_and_a_transformer_alone_leaves_the_adapters():
    model, inputs = lora(), batch()
    out = model(*inputs)
    other = sd3(seed=9, lora_rank=2, lora_alpha=3.0)
    assert not torch.allclose(other(*inputs), out, atol=1e-2)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs), out)
    whole = sd3(seed=9).state_dict()
    model.load_state_dict(whole, strict=True)
    for name, value in model.state_dict().items():
        expected = other.state_dict()[name] if is_adapter(name) else whole[name.replace(".base_layer.", ".")]
        assert torch.equal(value, expected), name
    del whole["proj_out.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*proj_out\.bias"):
        model.load_state_dict(whole, strict=True)


# ------------------------------------------------------------------------------------------------------ in the loop


@pytest.mark.parametrize("make", [sd3, lora])
def test_a_call_with_other_parameters_uses_them_and_leaves_the_networks_own(make):
    model, inputs = make(), batch()
    out = model(*inputs)
    averaged = {name: 0.7 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = torch.func.functional_call(model, averaged, inputs)
    assert torch.equal(model(*inputs), out)
    model.load_state_dict({**model.state_dict(), **averaged})
    assert not torch.allclose(found, out, atol=1e-3)
    torch.testing.assert_close(model(*inputs), found, rtol=1e-5, atol=1e-6)  # kernels differ with and without gradients


def test_gradients_are_reduced_by_ddp(tmp_path):
    mp.spawn(gradients_of_half, (2, tmp_path), nprocs=2)
    for make in (sd3, lora):
        model = make()
        model(*batch()).square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for rank in range(2):
            found = load_file(tmp_path / f"{make.__name__}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("size", "tensors", "elements", "gigabytes"),
    # Stated publicly: the medium file's tensors and elements; the size of both in bfloat16, large as 9.99 + 6.31 GB.
    [("medium", 909, 2_469_663_936, 4.94), ("large", None, None, 16.30)],
)
def test_published_sizes_have_their_number_of_elements(size, tensors, elements, gigabytes):
    with torch.device("meta"):
        model = SD3(SD3Config.published(size, image_size=512))
    state = model.state_dict()
    count = sum(value.numel() for value in state.values())
    assert (tensors, elements) in ((len(state), count), (None, None))
    assert 2 * count / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert model.config.input_size == 64
    assert model.config.null_label == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9}, "input_size must be a multiple of patch_size 2, got 9"),
        ({"input_size": 26}, "input_size must be at most 24, the position table's side, got 26"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"caption_projection_dim": 20}, "caption_projection_dim must be num_attention_heads * attention_head_dim"),
        ({"attention_head_dim": 3, "caption_projection_dim": 6}, "attention_head_dim must make the width a multiple"),
        ({"dual_attention_layers": (0, 3)}, "dual_attention_layers must be ascending numbers of the 3 blocks"),
        ({"dual_attention_layers": (1, 0)}, "dual_attention_layers must be ascending numbers of the 3 blocks"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob must lie in [0, 1), got 1.0"),
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"lora_alpha": 2.0}, "lora_alpha must be above 0 and needs a lora_rank, got 2.0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be above 0 and needs a lora_rank, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match="must") as caught:
        config(**changes)
    assert str(caught.value).startswith(message)


def test_a_configuration_is_read_from_json_and_refuses_what_it_does_not_know():
    reader = TypeAdapter(SD3Config)
    shape = config(lora_rank=4, lora_alpha=8.0)
    assert shape.lora_scale == 2
    assert config(lora_rank=4).lora_scale == 1
    text = reader.dump_json(shape)
    assert reader.validate_json(text) == shape
    with pytest.raises(ValidationError, match="lora_dropout"):
        reader.validate_json(text.replace(b'"lora_rank"', b'"lora_dropout":1,"lora_rank"'))
