"""Third-party modules from local directories in their own layouts: the only file that knows diffusers and transformers.

Nothing is ever downloaded: a name of a model hub is not a directory, and is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn


def load_vae(directory: Path) -> Any:
    """A diffusers AutoencoderKL in fp32, for inference.

    Raises:
        ValueError: the directory is not one in diffusers' layout.
    """
    from diffusers import AutoencoderKL

    return _inference(_load(AutoencoderKL, directory, "config.json", _complete=True, use_safetensors=True))


def load_dinov2(directory: Path) -> Any:
    """A transformers DINOv2, with or without registers as its config says, in fp32, for inference.

    Raises:
        ValueError: the directory is not one in transformers' layout, or of another model.
    """
    from transformers import AutoConfig, Dinov2Model, Dinov2WithRegistersModel

    kinds = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
    config = _load(AutoConfig, directory, "config.json", trust_remote_code=False)  # else it would ask on the terminal
    if config.model_type not in kinds:
        raise ValueError(f"{directory} must hold a model of {' or '.join(kinds)}, got {config.model_type!r}")
    return _inference(_load(kinds[config.model_type], directory, "config.json", _complete=True, use_safetensors=True))


def load_clip(directory: Path) -> Clip:
    """A CLIP in fp32, for inference, from config.json, model.safetensors, preprocessor_config.json and tokenizer.json.

    A merges.txt or vocab.json beside them is not read. Images are prepared by Pillow: without torchvision, and the same
    on every machine.

    Raises:
        ValueError: the directory is not in that layout.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    return Clip(
        _inference(_load(CLIPModel, directory, "config.json", _complete=True, use_safetensors=True)),
        _load(CLIPTokenizer, directory, "tokenizer.json"),
        _load(CLIPImageProcessorPil, directory, "preprocessor_config.json"),
    )


def build_sd3(config: Mapping[str, Any]) -> Any:
    """A diffusers SD3Transformer2DModel of this configuration, with fresh weights."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**config)


class TextEncoders:
    """The three text encoders of Stable Diffusion 3 in diffusers' pipeline layout, fp32, for inference.

    Args:
        directory: holds tokenizer, tokenizer_2, tokenizer_3, text_encoder, text_encoder_2, text_encoder_3.
        max_length: tokens of the T5 part (256 in the published training and sampling).

    Raises:
        ValueError: the directory is not in that layout, or a model of it lacks weights or has others.
    """

    def __init__(self, directory: Path, *, max_length: int = 256) -> None:
        from diffusers import StableDiffusion3Pipeline

        self.max_length = max_length
        absent = dict.fromkeys(("transformer", "vae", "scheduler"))
        self.pipeline: Any = StableDiffusion3Pipeline(**absent, **_text_parts(directory))

    @torch.no_grad()
    def encode(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and pooled embeddings (B, P), fp32, as the transformer takes them."""
        self.pipeline.to(device)
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(captions),
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_length,
        )
        return text.float(), pooled.float()


def text_widths(directory: Path) -> tuple[int, int]:
    """Widths of the embeddings that TextEncoders makes, of tokens and pooled, after the same checks of the directory.

    The values of the weights are not read, since a published T5's would take 19 GB of memory.

    Raises:
        ValueError: see TextEncoders.
    """
    parts = _text_parts(directory, device_map="meta")
    clips = parts["text_encoder"].config, parts["text_encoder_2"].config
    return parts["text_encoder_3"].config.d_model, sum(clip.projection_dim for clip in clips)


def _text_parts(directory: Path, **settings: Any) -> dict[str, Any]:
    """Encoders and tokenizers by their names in a pipeline, whose own loader would draw a missing weight at random."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    parts: dict[str, Any] = {}
    clip, t5 = (CLIPTextModelWithProjection, CLIPTokenizer), (T5EncoderModel, T5Tokenizer)
    for suffix, (model, tokenizer) in {"": clip, "_2": clip, "_3": t5}.items():
        encoder, words = directory / f"text_encoder{suffix}", directory / f"tokenizer{suffix}"
        loaded = _load(model, encoder, "config.json", _complete=True, use_safetensors=True, **settings)
        parts[encoder.name] = _inference(loaded)
        parts[words.name] = _load(tokenizer, words, "tokenizer_config.json")
    return parts


class Clip:
    """A CLIP of transformers with the tokenizer and the preprocessing of its own directory, from `load_clip`."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Any) -> None:
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.max_length: int = model.config.text_config.max_position_embeddings

    def tokens(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Tokens of captions, (B, max_length), padded to the full length: a caption's do not depend on its batch.

        Raises:
            ValueError: a caption has more tokens than the model has positions; a cut one would be scored as another.
        """
        rows = self.tokenizer(list(captions), verbose=False)["input_ids"]
        for caption, row in zip(captions, rows, strict=True):
            if len(row) > self.max_length:
                raise ValueError(
                    f"captions must have at most {self.max_length} tokens for this CLIP, got {len(row)} for "
                    f"{caption!r}; shorten it"
                )
        return self.tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.max_length, return_tensors="pt"
        )

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Projected embeddings (B, D) of captions; raises what `tokens` raises."""
        tokens = {name: value.to(self.model.device) for name, value in self.tokens(captions).items()}
        return self.model.get_text_features(**tokens).pooler_output

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Projected embeddings (B, D) of pixels (B, 3, H, W), uint8."""
        images = [Image.fromarray(image) for image in pixels.cpu().permute(0, 2, 3, 1).numpy()]
        values = self.preprocess(images, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values=values.to(self.model.device)).pooler_output


def check_index(index: Path) -> dict[str, str]:
    """Which file of its directory holds each tensor, as an index says it.

    Raises:
        ValueError: it says it not, or names a file elsewhere.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} must have a weight_map of tensors to files, got none; get the directory anew")
    outside = next((name for name in listed.values() if Path(name).name != name), None)
    if outside is not None:
        raise ValueError(f"{index} must list files beside it, got {outside!r}; get the directory anew")
    return listed


def read_json(path: Path) -> dict[str, Any]:
    """The map of settings in a JSON file.

    Raises:
        ValueError: there is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a readable JSON file; {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a map of settings, got a {type(content).__name__}; get the directory anew")
    return content


def _load(kind: Any, directory: Path, wanted: str, *, _complete: bool = False, **settings: Any) -> Any:
    """`kind.from_pretrained` of a local directory; `_complete` refuses a model whose file lacks or exceeds weights."""
    if not (Path(directory) / wanted).is_file():
        raise ValueError(f"{directory} must be a directory with a {wanted} in the layout of its library, got none")
    for index in Path(directory).glob("*.index.json"):
        check_index(index)
    _no_bars()
    if _complete:
        settings["output_loading_info"] = True
    try:
        loaded = kind.from_pretrained(str(directory), local_files_only=True, **settings)
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory} must hold a readable {kind.__name__}; {reason}") from error
    if not _complete:
        return loaded
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise ValueError(f"{directory} must fit {kind.__name__}, but {what} has {sorted(map(str, info[what]))[0]}")
    return model


def _no_bars() -> None:
    """Both libraries draw a bar for every model they load, and log in lines of their own what is raised here anyway."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(logging.CRITICAL)


def _inference(model: nn.Module) -> nn.Module:
    return model.float().eval().requires_grad_(False)
