"""Weights from files: the published layouts are read, code is not run, and a mismatch is explained."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sd3 import config as sd3_config
from worker_toys import MODEL

from workers.models.checkpoints import infer_config, load_weights, save_weights
from workers.models.ddt import DiTDH, DiTDHConfig
from workers.models.mismatch import check_architecture
from workers.models.sd3 import SD3, save_lora, save_sd3
from workers.models.sit import SiT, SiTConfig


def weights(**changes) -> dict[str, torch.Tensor]:
    return SiT(SiTConfig(**{**MODEL, **changes})).initialise(3).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_bare_state_dict_is_read(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    torch.save(weights(), path)
    assert same(load_weights(path), weights())


def test_the_average_of_a_trainers_file_is_read(tmp_path):
    """What SiT's trainer writes: model, ema, optimiser state and its arguments."""
    path, other = tmp_path / "0050000.pt", {name: value + 1 for name, value in weights().items()}
    optimizer = torch.optim.AdamW(SiT(SiTConfig(**MODEL)).parameters()).state_dict()
    arguments = argparse.Namespace(model="SiT-XL/2", cfg_scale=4.0, ckpt=None)
    torch.save({"model": other, "ema": weights(), "opt": optimizer, "args": arguments}, path)
    assert same(load_weights(path), weights())


def test_safetensors_are_read(tmp_path):
    save_file(weights(), tmp_path / "ema.safetensors")
    assert same(load_weights(tmp_path / "ema.safetensors"), weights())


class Code:
    """Unpickles to a call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: {"ema": weights(), "args": code}])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_not_run(tmp_path, save, wrap):
    path, marker = tmp_path / "evil.pt", tmp_path / "was-here"
    save(wrap(Code(marker)), path)
    with pytest.raises(ValueError, match=r"checkpoint evil\.pt must hold tensors only") as caught:
        load_weights(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert "holds code: it asks for posix.mkdir, which is not run; get a file of tensors" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello", "got a text that begins 'hello'; get the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a text that begins 'version https://git-lfs.",
        ),
        (b"", "got an empty file; get it anew"),
        (bytes(99), "got a file of another kind; get the file itself"),
        (b"PK\x03\x04 and so on", "got a zip that was cut off or altered"),
        (pickle.dumps(3), "got a pickle that was cut off or altered, or is none of torch's"),
        (pickle.dumps({"a": torch.zeros(2)}), "got a pickle that was cut off or altered, or is none of torch's"),
        (pickle.dumps({"a": np.zeros(2)}), r"it asks for numpy\._core\.multiarray\._reconstruct"),
        (pickle.dumps({"a": np.zeros(2)}, 2), r"it asks for numpy\._core\.multiarray\._reconstruct"),
    ],
)
def test_what_a_file_is_instead_is_said_for_people(tmp_path, content, words):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"must hold tensors only, in torch's own format; .*{words}"):
        load_weights(path)


@pytest.mark.filterwarnings("ignore:.*(beta|deprecated|prototype):UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (torch.Tensor.to_sparse_csr, "torch.sparse_csr"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantised, torch.qint8"),
        (lambda value: torch.nested.nested_tensor([value[0], value[1, :1]]), "nested"),
        (lambda value: value.to("meta"), "meta, without numbers"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, make, kind):
    torch.save({"good": torch.eye(2), "odd": make(torch.eye(2))}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt must hold dense tensors .*, got another kind in odd \({kind}\)"):
        load_weights(tmp_path / "x.pt")


def test_eight_bit_floats_are_looked_at(tmp_path):
    """Torch's isfinite has no answer for this type."""
    found = {name: value.to(torch.float8_e4m3fn) for name, value in weights().items()}
    check_architecture(found, SHAPE, "x.pt")
    found["pos_embed"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="must hold finite numbers, got others in pos_embed"):
        check_architecture(found, SHAPE, "x.pt")


@pytest.mark.parametrize("ending", [False, True])
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, ending):
    torch.save({"a": torch.arange(12.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=ending)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(0, len(whole), 5):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checkpoint x\.pt must hold tensors only"):
            load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("place", "value"), [("flags", 1), ("method", 99), ("method", 8), ("method", 12), ("method", 14)]
)
def test_a_zip_whose_headers_were_altered_is_refused(tmp_path, place, value):
    """Marked as encrypted, or as compressed by a method that nobody has, or that its content is not in."""
    torch.save({"a": torch.arange(12.0)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # each file's own header and the directory's
        content[content.find(mark) + flags + (2 if place == "method" else 0)] = value
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint x\.pt must .*; get it anew$"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", [b"garbage", b"", None])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, damage):
    path = tmp_path / name
    if damage is None:
        (torch.save if name.endswith("pt") else save_file)(weights(), path)
        damage = path.read_bytes()[:-100]
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=f"checkpoint {name} must") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"ema": 4}, {"ema": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"checkpoint x\.pt must be a state dict or hold one as 'ema'"):
        load_weights(tmp_path / "x.pt")


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth, got 'model\.bin'"):
        load_weights(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"checkpoint {name} must .*No such file"):
        load_weights(tmp_path / name)


SHAPE = SiTConfig(**MODEL)


def test_fitting_weights_are_accepted():
    check_architecture(weights(), SHAPE, "x.pt")


UNTOLD = "; nothing in the file tells whether {} is what it was trained with"


@pytest.mark.parametrize(
    ("stored", "problem", "cure"),
    [
        (
            {"learn_sigma": True},
            "final_layer.linear.bias has shape (32,) instead of (16,)",
            "model.learn_sigma to true",
        ),
        (
            {"depth": 2},
            "blocks.1.adaLN_modulation.1.bias is not part of it (10 in all)",
            f"model.depth to 2{UNTOLD.format('model.noise_at 0 (SiT)')}",
        ),
        (
            {"hidden_size": 24},
            "blocks.0.adaLN_modulation.1.bias has shape (144,) instead of (96,)",
            f"model.hidden_size to 24{UNTOLD.format('model.num_heads 2 and model.noise_at 0 (SiT)')}",
        ),
        (
            {"input_size": 16},
            "pos_embed has shape (1, 16, 16) instead of (1, 4, 16)",
            f"model.input_size to 16{UNTOLD.format('model.noise_at 0 (SiT)')}",
        ),
        ({"noise_at": 1}, None, None),
        (
            {"projector_dims": (6,), "projector_depth": 1, "noise_at": 1},
            "projectors.0.0.bias is not part of it (6 in all)",
            "model.noise_at to 1, model.projector_dims to [6], model.projector_depth to 1",
        ),
        (
            {"projector_dims": (6, 7), "projector_depth": 1, "noise_at": 1},
            "projectors.0.0.bias is not part of it (12 in all)",
            "model.noise_at to 1, model.projector_dims to [6, 7], model.projector_depth to 1, "
            "and alignment_weight to 0",
        ),
    ],
)
def test_a_mismatch_names_its_first_difference_and_what_the_file_is(stored, problem, cure):
    found = weights(**stored)
    if problem is None:  # nothing in a file says which way its time runs
        check_architecture(found, SHAPE, "x.pt")
        return
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(found, SHAPE, "x.pt")
    assert str(caught.value) == f"checkpoint x.pt must fit the model, but {problem}; set {cure}"
    check_architecture(found, SiTConfig(**{**MODEL, **stored}), "x.pt")


PROJECTORS = {"projector_dims": (6,), "projector_depth": 1}


@pytest.mark.parametrize(("stored", "noise_at"), [({"learn_sigma": True}, 0), (PROJECTORS, 1)])
def test_a_time_that_runs_the_other_way_is_refused(stored, noise_at):
    """Twice the channels are SiT's, projectors are REPA's: either says which way its time runs."""
    right, wrong = (SiTConfig(**MODEL, **stored, noise_at=its) for its in (noise_at, 1 - noise_at))
    check_architecture(weights(**stored), right, "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt must run in its own time, .*; set model\.noise_at to {noise_at}$"):
        check_architecture(weights(**stored), wrong, "x.pt")


def test_the_cure_for_a_sits_file_in_a_repas_place_turns_its_time_too():
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(weights(learn_sigma=True), SiTConfig(**MODEL, **PROJECTORS, noise_at=1), "x.pt")
    cure = "model.learn_sigma to true, model.noise_at to 0, model.projector_dims to [], and alignment_weight to 0"
    assert cure in str(caught.value)


def test_a_label_table_of_another_size_is_named():
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(weights(num_classes=12), SHAPE, "x.pt")
    problem = "y_embedder.embedding_table.weight has shape (13, 16) instead of (11, 16)"
    cure = "it is a sit whose num_classes must be 13 or 12 for a label table of 13 rows, got 10"
    assert str(caught.value) == f"checkpoint x.pt must fit the model, but {problem}; {cure}"


def test_a_missing_tensor_is_named():
    incomplete = weights()
    del incomplete["t_embedder.mlp.2.weight"]
    altered = "the file is incomplete or was altered, by its other tensors it is a sit with these settings"
    with pytest.raises(ValueError, match=rf"but t_embedder\.mlp\.2\.weight is missing \(1 in all\); {altered}$"):
        check_architecture(incomplete, SHAPE, "x.pt")
    with pytest.raises(ValueError, match=rf"but stray is not part of it \(1 in all\); {altered}$"):
        check_architecture(weights() | {"stray": torch.zeros(2)}, SHAPE, "x.pt")
    del incomplete["final_layer.linear.weight"]  # which the settings are read from
    with pytest.raises(ValueError, match=rf"is missing \(2 in all\); {altered}$"):
        check_architecture(incomplete, SHAPE, "x.pt")


def test_another_family_is_named():
    config = DiTDHConfig(
        input_size=4, in_channels=6, hidden_size=(8, 12), depth=(1, 1), num_heads=(2, 3), num_classes=10
    )
    with pytest.raises(ValueError, match=r"; it is a ddt; set model\.family; mixflow import prints"):
        check_architecture(DiTDH(config).state_dict(), SHAPE, "x.pt")
    with pytest.raises(ValueError, match=r"; it is a sit; set model\.family; mixflow import prints"):
        check_architecture(SiT(SiTConfig.published("S")).state_dict(), DiTDHConfig.published("S"), "x.pt")
    with pytest.raises(ValueError, match=r"; it is a sit; set model\.family; "):  # of no published width
        check_architecture(weights(), config, "x.pt")
    with pytest.raises(ValueError, match=r"; it is an sd3; set model\.family$"):
        check_architecture(SD3(sd3_config()).state_dict(), SHAPE, "x.pt")
    with pytest.raises(ValueError, match=r"; it is of no known family; give a file of SiT, REPA, RAE or Stable"):
        check_architecture({"a": torch.zeros(2)}, SHAPE, "x.pt")


def test_repas_own_time_is_kept_where_a_file_does_not_tell_it():
    """A file without projectors looks like a SiT's, and noise_at 0 would let its time run backwards."""
    config = SiTConfig(**MODEL, noise_at=1, projector_dims=(6,), projector_depth=1)
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(weights(), config, "x.pt")
    untold = UNTOLD.format("model.noise_at 1 (REPA)")
    assert str(caught.value).endswith(f"; set model.projector_dims to [], and alignment_weight to 0{untold}")
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(weights(depth=2), SiTConfig(**MODEL, noise_at=1), "x.pt")
    assert str(caught.value).endswith(f"; set model.depth to 2{untold}")


def test_the_heads_of_a_published_width_are_its_own():
    """A SiT-XL/2 in the place of a SiT-B/2, whose twelve heads would divide its width too."""
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(
            SiT(dataclasses.replace(SiTConfig.published("XL"), depth=1)).state_dict(), SiTConfig.published("B"), "x.pt"
        )
    assert "set model.hidden_size to 1152, model.depth to 1, model.num_heads to 16" in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "cure"),
    [
        ({"num_layers": 2}, "set model.num_layers to 2"),
        ({"joint_attention_dim": 48}, "set model.joint_attention_dim to 48"),
        ({"pooled_projection_dim": 12}, "set model.pooled_projection_dim to 12"),
        ({"pos_embed_max_size": 10}, "set model.pos_embed_max_size to 10"),
        ({"in_channels": 2}, "set model.in_channels to 2"),
        ({"patch_size": 4}, "set model.patch_size to 4"),
        ({"dual_attention_layers": (0,)}, "set model.dual_attention_layers to [0]"),
        ({"qk_norm": None}, "set model.qk_norm to null"),
        ({"attention_head_dim": 4, "num_attention_heads": 4}, "model.num_attention_heads to 4, model.attention_head_"),
        (
            {"num_attention_heads": 3, "caption_projection_dim": 24},
            "set model.num_attention_heads to 3, model.caption_projection_dim to 24",
        ),
    ],
)
def test_settings_of_sd3_are_read_from_its_file(stored, cure):
    found, config = SD3(sd3_config(**stored)).state_dict(), sd3_config()
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(found, config, "x.pt")
    assert cure in str(caught.value)
    check_architecture(found, sd3_config(**stored), "x.pt")
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(found, sd3_config(lora_rank=2), "x.pt")
    assert cure in str(caught.value)


def test_an_incomplete_sd3_is_named():
    found = SD3(sd3_config()).state_dict()
    del found["context_embedder.weight"]
    with pytest.raises(ValueError, match=r"the file is incomplete or was altered, .* it is an sd3 with these settings"):
        check_architecture(found, sd3_config(), "x.pt")


# What a file says of itself


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("name", ["S", "B", "L", "XL"])
def test_the_published_sizes_of_sit_are_found_out_from_their_files(name, image_size):
    for learn_sigma in (True, False):
        config = SiTConfig.published(name, image_size=image_size, learn_sigma=learn_sigma)
        with torch.device("meta"):
            found = infer_config(SiT(config).state_dict(), family=None if learn_sigma else "sit")
        assert found == dataclasses.replace(config, mlp_ratio=4.0)


@pytest.mark.parametrize("dims", [(768,), (768, 1024)])
def test_repa_is_found_out_by_its_projectors(dims):
    config = SiTConfig.repa("B", projector_dims=dims)
    with torch.device("meta"):
        weights = SiT(config).state_dict()
    assert infer_config(weights) == config
    plain = {name: value for name, value in weights.items() if not name.startswith("projectors")}
    with pytest.raises(ValueError, match=r"family must be sit or repa for a file with neither .*, got none; give --f"):
        infer_config(plain)
    assert infer_config(plain, family="sit").noise_at == 0
    assert infer_config(plain, family="repa").noise_at == 1


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("size", ["S", "B", "XL"])
def test_raes_are_found_out_from_their_files(size, image_size):
    config = DiTDHConfig.published(size, image_size=image_size)
    with torch.device("meta"):
        assert infer_config(DiTDH(config).state_dict()) == config


def test_the_null_row_is_read_from_imagenets_label_table():
    config = SiTConfig.published("S")
    bare = dataclasses.replace(config, class_dropout_prob=0.0)
    with torch.device("meta"):
        assert infer_config(SiT(bare).state_dict()) == bare
        found = SiT(dataclasses.replace(config, num_classes=10)).state_dict()
    with pytest.raises(ValueError, match="num_classes must be given for a label table of 11 rows"):
        infer_config(found)
    assert infer_config(found, num_classes=11).null_label is None
    assert infer_config(found, num_classes=10).null_label == 10
    with pytest.raises(ValueError, match="num_classes must be 11 or 10 for a label table of 11 rows, got 7"):
        infer_config(found, num_classes=7)


def test_what_a_file_cannot_say_must_be_given():
    with pytest.raises(ValueError, match="num_heads must be given for a width of 16, which no published size has"):
        infer_config(weights(), family="sit", num_classes=10)
    assert infer_config(weights(), family="sit", num_classes=10, num_heads=2) == SHAPE
    with pytest.raises(ValueError, match=r"checkpoint must be of a known family: .* got a, b"):
        infer_config({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_repas_older_names_are_renamed(tmp_path):
    found = weights(depth=3)
    old = {re.sub(r"^blocks\.([12])\.", lambda k: f"decoder_blocks.{int(k[1]) - 1}.", n): v for n, v in found.items()}
    assert sum(name.startswith("decoder_blocks") for name in old) == 20
    torch.save(old, tmp_path / "old.pt")
    back = load_weights(tmp_path / "old.pt")
    assert back.keys() == found.keys()
    assert all(torch.equal(back[name], found[name]) for name in found)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, name):
    found = weights()
    save_weights(found, tmp_path / name)
    back = load_weights(tmp_path / name)
    assert back.keys() == found.keys()
    assert all(torch.equal(back[key], found[key]) for key in found)
    if name == "x.pt":
        assert torch.load(tmp_path / name, weights_only=True).keys() == {"ema"}
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.pt, got 'x\.bin'"):
        save_weights(found, tmp_path / "x.bin")


def test_two_names_for_one_tensor_are_written_as_two_tensors(tmp_path):
    found = weights()
    found["again"] = found["x_embedder.proj.bias"]
    save_weights(found, tmp_path / "x.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    assert torch.equal(written["again"], written["x_embedder.proj.bias"])
    assert written.keys() == found.keys()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="meta"):
        save_weights({"x": torch.empty(3, device="meta")}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_weights(weights(), tmp_path / "x.pt")
        save_weights(weights(), tmp_path / "x.safetensors")
        save_sd3(tmp_path / "sd3", sd3_config(), SD3(sd3_config()).state_dict())
        lora = sd3_config(lora_rank=2)
        save_lora(tmp_path / "lora", lora, SD3(lora).state_dict())
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
