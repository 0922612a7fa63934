"""Stable Diffusion 3.5 on disk: transformers and adapters to and from diffusers, and the text encoders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sd3 import CLIP_WIDTHS, SHAPE, T5_WIDTH, batch, captions, config, lora, sd3, theirs, tiny_text_encoders

from workers.models.sd3 import SD3, SD3Config, load_sd3, save_lora, save_sd3
from workers.pretrained import TextEncoders, text_widths

CPU = torch.device("cpu")


def call(transformer, x, t, y):
    """Diffusers' transformer in this project's convention, with the captions of a tiny network."""
    text, pooled = (torch.from_numpy(table)[y] for table in captions(config()))
    with torch.no_grad():
        return -transformer(
            hidden_states=x, timestep=1000 * (1 - t), encoder_hidden_states=text, pooled_projections=pooled
        ).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_goes_out_and_comes_back_bit_for_bit(tmp_path, dtype):
    model = sd3()
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_sd3(tmp_path / "a" / "transformer", model.config, weights)
    fields, found = load_sd3(tmp_path / "a" / "transformer")
    assert SD3Config(input_size=SHAPE["input_size"], num_classes=SHAPE["num_classes"], **fields) == model.config
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in weights.items())


def test_diffusers_reads_what_was_written(tmp_path):
    from diffusers import SD3Transformer2DModel

    model, inputs = sd3(), batch()
    save_sd3(tmp_path, model.config, model.state_dict())
    transformer, info = SD3Transformer2DModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(call(transformer, *inputs), model(*inputs))


def test_what_diffusers_wrote_in_several_files_inside_a_pipeline_is_read(tmp_path):
    model = sd3()
    theirs(model).save_pretrained(str(tmp_path / "transformer"), max_shard_size="40KB")
    (tmp_path / "model_index.json").write_text("{}")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    fields, found = load_sd3(tmp_path)
    other = SD3(SD3Config(input_size=8, num_classes=3, **fields))
    other.load_state_dict(found, strict=True)
    other.set_captions(*captions(model.config))
    assert torch.equal(other(*batch()), model(*batch()))
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())
    file, name = next(iter(whole["weight_map"].values())), next(iter(whole["weight_map"]))
    for wrong, problem in (
        ({"weight_map": {**whole["weight_map"], "zzz": file}}, "but zzz is in no file; get"),
        ({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}}, f"but {name} is not listed; get"),
        (
            {"weight_map": {**whole["weight_map"], name: "other.safetensors"}},
            f"but {name} is in {file} and listed in oth",
        ),
        ({}, "must have a weight_map of tensors to files"),
        ([], "must hold a map of settings, got a list"),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=problem):
            load_sd3(tmp_path)
    index.write_text(json.dumps(whole))
    next((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="must be a readable safetensors file"):
        load_sd3(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "must hold an SD3Transformer2DModel, got 'FluxTransformer2DModel'"),
        ({"guidance_embeds": True}, "but it has, unknown here, guidance_embeds"),
        ({"num_layers": None}, "but it does not have num_layers"),
        ({"out_channels": 8}, "out_channels must equal in_channels 4, got 8"),
    ],
)
def test_another_model_is_refused(tmp_path, changes, message):
    model = sd3()
    save_sd3(tmp_path, model.config, model.state_dict())
    path = tmp_path / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(ValueError, match="must") as caught:
        load_sd3(tmp_path)
    assert message in str(caught.value)


def test_an_old_configuration_means_what_it_meant_then(tmp_path):
    """Stable Diffusion 3's has neither qk_norm nor dual_attention_layers, large's no dual_attention_layers."""
    model = sd3(dual_attention_layers=(), qk_norm=None)
    save_sd3(tmp_path, model.config, model.state_dict())
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["qk_norm"], content["dual_attention_layers"]
    path.write_text(json.dumps(content))
    fields, _ = load_sd3(tmp_path)
    assert (fields["qk_norm"], fields["dual_attention_layers"]) == (None, ())
    with pytest.raises(ValueError, match="must be a readable JSON file"):
        load_sd3(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------- adapters


def test_diffusers_loads_the_adapters_and_the_merged_transformer(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    model, inputs = lora(), batch()
    expected = model(*inputs)
    save_sd3(tmp_path / "whole", model.config, model.state_dict())
    merged = SD3Transformer2DModel.from_pretrained(str(tmp_path / "whole"))
    torch.testing.assert_close(call(merged, *inputs), expected, rtol=1e-4, atol=1e-5)

    save_lora(tmp_path / "lora", model.config, model.state_dict())
    transformer = theirs(sd3())
    assert not torch.allclose(call(transformer, *inputs), expected, atol=1e-2)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")),
    )
    other, file = theirs(sd3()), "pytorch_lora_weights.safetensors"
    other.load_lora_adapter(str(tmp_path / "lora"), weight_name=file, use_safetensors=True)
    torch.testing.assert_close(call(other, *inputs), expected, rtol=1e-5, atol=1e-6)
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(call(transformer, *inputs), expected, rtol=1e-5, atol=1e-6)


def test_there_must_be_adapters_to_export(tmp_path):
    with pytest.raises(ValueError, match="weights must hold LoRA adapters, got none"):
        save_lora(tmp_path, sd3().config, sd3().state_dict())


# ------------------------------------------------------------------------------------------------------ text encoders

PROMPTS = ["a cat", "", "Dogs, and more of them than there is room for"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoders")
    tiny_text_encoders(directory)
    return directory


def test_embeddings_are_the_published_arrangement_of_three_encoders(encoders):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    text, pooled = TextEncoders(encoders, max_length=16).encode(PROMPTS, CPU)
    expected, vectors, clips = torch.zeros(3, 24 + 16, SHAPE["joint_attention_dim"]), [], []
    for suffix in ("", "_2"):
        tokenizer = CLIPTokenizer.from_pretrained(str(encoders / f"tokenizer{suffix}"))
        clip = CLIPTextModelWithProjection.from_pretrained(str(encoders / f"text_encoder{suffix}"))
        tokens = tokenizer(PROMPTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = clip(tokens.input_ids, output_hidden_states=True)
        vectors.append(out.text_embeds)
        clips.append(out.hidden_states[2])  # of three layers the second's
    # The two CLIPs side by side, zeros up to T5's width, and T5's tokens behind them.
    expected[:, :24, : sum(CLIP_WIDTHS)] = torch.cat(clips, 2)
    tokenizer = T5Tokenizer.from_pretrained(str(encoders / "tokenizer_3"))
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected[:, 24:] = T5EncoderModel.from_pretrained(str(encoders / "text_encoder_3"))(tokens.input_ids)[0]
    torch.testing.assert_close(text, expected)
    torch.testing.assert_close(pooled, torch.cat(vectors, 1))
    assert (text[0] - text[1]).abs().mean() > 0.1
    assert (pooled[0] - pooled[1]).abs().mean() > 0.1


def test_embeddings_are_the_pipelines_and_their_batch_mates_do_not_matter(encoders):
    from diffusers import StableDiffusion3Pipeline

    ours = TextEncoders(encoders, max_length=16)
    text, pooled = ours.encode(PROMPTS, CPU)
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(encoders), transformer=None, vae=None, scheduler=None)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            # The pipeline's own empty prompt is what it guides away from.
            found = pipeline.encode_prompt(prompt or "a", None, None, negative_prompt="", max_sequence_length=16)
        first = 0 if prompt else 1
        torch.testing.assert_close(text[row], found[first][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[row], found[first + 2][0], rtol=1e-4, atol=1e-5)
        alone = ours.encode([prompt], CPU)
        torch.testing.assert_close(alone[0][0], text[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1][0], pooled[row], rtol=1e-4, atol=1e-5)


def test_files_in_half_precision_are_computed_in_single(tmp_path):
    tiny_text_encoders(tmp_path, dtype=torch.float16)
    encoders = TextEncoders(tmp_path, max_length=16)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert {p.dtype for p in getattr(encoders.pipeline, part).parameters()} == {torch.float32}
    text, pooled = encoders.encode(PROMPTS, CPU)
    assert text.dtype == pooled.dtype == torch.float32
    assert not torch.equal(text, text.half().float())


PARTS = {
    "text_encoder": "text_projection.weight",
    "text_encoder_2": "text_model.final_layer_norm.bias",
    "text_encoder_3": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
}


@pytest.mark.parametrize("read", [TextEncoders, text_widths])
@pytest.mark.parametrize("part", PARTS)
def test_text_encoders_with_a_weight_too_few_or_too_many_are_refused(tmp_path, part, read):
    tiny_text_encoders(tmp_path)
    file, name = tmp_path / part / "model.safetensors", PARTS[part]
    weights = load_file(file)
    save_file({other: value for other, value in weights.items() if other != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys has") as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / part} must fit ")
    assert str(caught.value).endswith(f"but missing_keys has {name}")
    save_file({**weights, "extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="but unexpected_keys has extra"):
        read(tmp_path)
    save_file({**weights, name: torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path / part} must hold a readable"):
        read(tmp_path)


@pytest.mark.parametrize("read", [TextEncoders, text_widths])
@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer", "tokenizer_3"])
def test_a_pipeline_without_one_of_its_text_parts_is_refused(tmp_path, part, read):
    tiny_text_encoders(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=f"{tmp_path / part} must be a directory with a "):
        read(tmp_path)


def test_widths_are_those_of_the_embeddings(encoders):
    made = TextEncoders(encoders, max_length=16).encode(["a"], CPU)
    assert text_widths(encoders) == tuple(values.shape[-1] for values in made) == (T5_WIDTH, sum(CLIP_WIDTHS))


def test_captions_drive_the_network(encoders):
    text, pooled = TextEncoders(encoders, max_length=16).encode([*PROMPTS, ""], CPU)
    model, (x, t, _) = sd3(), batch(size=1)
    model.set_captions(text.numpy().astype(np.float16), pooled.numpy().astype(np.float16))
    cat, empty, dogs, null = (model(x, t, torch.tensor([row])) for row in range(4))
    assert torch.allclose(empty, null, atol=1e-5)
    assert not torch.allclose(cat, null, atol=1e-3)
    assert not torch.allclose(dogs, null, atol=1e-3)
