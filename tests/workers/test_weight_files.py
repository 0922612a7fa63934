"""Weights from files: the published layouts are read, code is not run, and a mismatch is explained."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from worker_toys import MODEL

from workers.models.checkpoints import check_architecture, load_weights
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


@pytest.mark.parametrize(("stored", "cure"), [(True, "true"), (False, "false")])
def test_learn_sigma_has_its_own_cure(stored, cure):
    shape = SiTConfig(**MODEL, learn_sigma=not stored)
    with pytest.raises(ValueError, match="learn_sigma") as caught:
        check_architecture(weights(learn_sigma=stored), shape, "x.pt")
    assert str(caught.value) == (
        f"checkpoint x.pt must fit the model, but learn_sigma differs; set learn_sigma to {cure}"
    )
    check_architecture(weights(learn_sigma=stored), SiTConfig(**MODEL, learn_sigma=stored), "x.pt")


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"depth": 2}, "blocks.1.adaLN_modulation.1.bias is not part of it (10 in all)"),
        ({"hidden_size": 24}, "blocks.0.adaLN_modulation.1.bias has shape (144,) instead of (96,)"),
        ({"num_classes": 12}, "y_embedder.embedding_table.weight has shape (13, 16) instead of (11, 16)"),
    ],
)
def test_a_mismatch_names_its_first_difference(stored, problem):
    with pytest.raises(ValueError, match="must fit the model") as caught:
        check_architecture(weights(**stored), SHAPE, "x.pt")
    assert str(caught.value) == (
        f"checkpoint x.pt must fit the model, but {problem}; set the model's sizes to the checkpoint's"
    )


def test_a_missing_tensor_is_named():
    incomplete = weights()
    del incomplete["t_embedder.mlp.2.weight"]
    with pytest.raises(ValueError, match=r"but t_embedder\.mlp\.2\.weight is missing \(1 in all\); set"):
        check_architecture(incomplete, SHAPE, "x.pt")
