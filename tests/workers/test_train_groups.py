"""One, two and three gloo processes: the same samples, the same losses, and the same bits after a restart."""

from __future__ import annotations

import json
import pickle
import shutil

import loop_group
import pytest
import torch
from loop_group import BAD_SHARD, BAD_STEP, RESUME_STEP, state
from safetensors.torch import load_file
from worker_toys import differences, latents, local_io, parts, pixels, run_config

from workers.models.sit import SiT
from workers.train import NonFiniteLossError, post_train

WORLDS = (1, 2, 3)
# A contiguous run of the 8 shards for each worker.
SHARDS = {1: [range(8)], 2: [range(4), range(4, 8)], 3: [range(3), range(3, 6), range(6, 8)]}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Every scenario on every number of workers; the file store of the group needs no port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        threads, modes = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        found = {}
        for world in WORLDS:
            found[world] = tmp_path_factory.mktemp(f"group{world}")
            loop_group.run_group(world, found[world])
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(modes)
    return found


@pytest.fixture(scope="module")
def draws(groups):
    return {
        world: [pickle.loads((groups[world] / f"draws-{rank}.pickle").read_bytes()) for rank in range(world)]
        for world in WORLDS
    }


@pytest.mark.parametrize("mode", ["plain", "reproducible", "corrected"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(groups, world, mode):
    whole, resumed = state(groups[world], mode), state(groups[world], f"{mode}-resumed")
    assert differences(whole, resumed) == []
    assert whole.step == 50
    assert [row["step"] for row in resumed.history if "train/loss" in row] == list(range(1, 51))
    assert [row["step"] for row in resumed.history if "eval/loss" in row] == [10, 20, 30, 40, 50]
    names = {path.name.split("-")[1] for path in (groups[world] / f"{mode}-resumed" / "checkpoints").iterdir()}
    assert len(names) == 5, "the resumed run wrote the checkpoints after step 20 itself"


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_where_one_rank_is_asked_to_stop_all_do_after_the_same_step_and_go_on_exactly(groups, world, reproducible):
    name = f"stopped-{reproducible}"
    for rank in range(world):
        said = (groups[world] / f"{name}-{rank}.txt").read_text()
        assert said == "stopped after step 17, whose state is kept"
    whole = state(groups[world], "reproducible" if reproducible else "plain")
    assert differences(whole, state(groups[world], name)) == []


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_ends_with_the_same_bits(groups, world):
    for rank in range(1, world):
        assert differences(state(groups[world], "plain"), state(groups[world], "plain", rank)) == []


@pytest.mark.parametrize("world", WORLDS)
def test_each_worker_draws_its_shards_and_all_workers_together_the_same_samples(draws, world):
    for rank, found in enumerate(draws[world]):
        assert set(found) == {(step, shard) for step in range(50) for shard in SHARDS[world][rank]}
    together = {key: value for found in draws[world] for key, value in found.items()}
    assert together == draws[1][0]
    assert len(set(together.values())) == 400, "no two shards of any two steps hold the same samples"


@pytest.mark.parametrize("world", [2, 3])
def test_losses_agree_between_numbers_of_workers(groups, world):
    one, many = (
        [row["train/loss"] for row in state(groups[w], "plain").history if "train/loss" in row] for w in (1, world)
    )
    assert len(one) == 50
    assert many == pytest.approx(one, rel=1e-5)
    assert one[-1] < 0.8 * one[0], "the weights moved, or nothing would have been compared"


@pytest.mark.parametrize("world", [2, 3])
def test_correctives_draw_the_same_on_any_number_of_workers(groups, world):
    """A self-rollout is a second forward pass without gradient through whatever wraps the network."""
    one, many, plain = (
        [row["train/loss"] for row in state(groups[w], mode).history if "train/loss" in row]
        for w, mode in ((1, "corrected"), (world, "corrected"), (1, "plain"))
    )
    assert len(one) == len(many) == 50
    assert many == pytest.approx(one, rel=1e-4)
    assert max(abs(a - b) for a, b in zip(one, plain, strict=True)) > 1e-3


@pytest.mark.parametrize("world", [2, 3])
def test_the_reproducible_mode_gives_the_same_bits_on_every_number_of_workers(groups, world):
    assert differences(state(groups[1], "reproducible"), state(groups[world], "reproducible")) == []


@pytest.mark.parametrize("world", WORLDS)
def test_the_reproducible_mode_trains_on_the_same_gradients(groups, world):
    plain, ordered = (
        [row["train/grad_norm"] for row in state(groups[world], mode).history[:20] if "train/grad_norm" in row]
        for mode in ("plain", "reproducible")
    )
    assert ordered == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_accumulation_changes_nothing_but_rounding(groups, world, per_pass):
    joined = [row for row in state(groups[world], "plain").history if row["step"] <= 10]
    accumulated = state(groups[world], f"per-pass-{per_pass}")
    assert accumulated.step == 10
    for row, other in zip(accumulated.history, joined, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_activations_that_are_computed_again_change_no_bit(groups, world):
    kept = [row for row in state(groups[world], "plain").history if row["step"] <= 10]
    assert state(groups[world], "recomputed").history == kept


@pytest.mark.parametrize("more", ["", "-corrected"])
def test_a_sharded_run_is_the_whole_one_up_to_rounding(groups, more):
    whole, sharded = state(groups[2], f"clipped{more}"), state(groups[2], f"sharded{more}")
    assert parts(sharded).keys() == parts(whole).keys()
    for row, other in zip(sharded.history, whole.history, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert max(row.get("train/grad_norm", 0) for row in whole.history) > 0.5, "the clip acted"
    for name, value in parts(sharded).items():
        # Softmax ignores the keys' bias, the middle third: its gradient is rounding alone, which Adam makes large.
        thirds = [slice(0, 16), slice(32, 48)] if name.endswith("qkv.bias") else [slice(None)]
        for third in thirds:
            torch.testing.assert_close(value[third], parts(whole)[name][third], rtol=1e-2, atol=1e-4)
    start = SiT(run_config().model).initialise(5).state_dict()
    assert torch.equal(sharded.model["pos_embed"], start["pos_embed"])
    assert not torch.equal(sharded.model["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])


def test_a_resumed_sharded_run_equals_the_uninterrupted_one_bit_for_bit(groups):
    assert differences(state(groups[2], "sharded"), state(groups[2], "sharded-resumed")) == []
    others = parts(state(groups[2], "sharded", 1))
    assert all(value.is_meta for value in others.values()), "only rank 0 puts the state together"


def test_sharded_passes_accumulate(groups):
    joined = [row for row in state(groups[2], "sharded").history if row["step"] <= 10]
    for row, other in zip(state(groups[2], "sharded-passes").history, joined, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_a_sharded_checkpoint_goes_on_on_one_worker(groups, tmp_path):
    shutil.copytree(groups[2] / "sharded", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > RESUME_STEP:
            shutil.rmtree(path)
    alone = post_train(run_config(grad_clip=0.5), pixels(), pixels(24, seed=1), local_io(tmp_path / "run"))
    for row, other in zip(alone.history, state(groups[2], "sharded").history, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_the_ranks_write_a_sharded_checkpoint_together_in_files_that_do_not_depend_on_them(
    groups, tmp_path, monkeypatch
):
    monkeypatch.setattr("workers.checkpoint.FILE_BYTES", loop_group.SMALL_FILE)
    post_train(run_config(steps=10), pixels(), pixels(24, seed=1), local_io(tmp_path))
    (alone,) = (tmp_path / "checkpoints").iterdir()
    (split,) = (groups[2] / "split" / "checkpoints").iterdir()
    written = [json.loads((groups[2] / f"split-{rank}.json").read_text()) for rank in range(2)]
    tensors = [[name for name in files if name.endswith(".safetensors")] for files in written]
    assert len(tensors[0]) - len(tensors[1]) in (0, 1)
    assert set(written[0]) - set(tensors[0]) == {"history.jsonl", "run.json"}
    assert sorted(tensors[0] + tensors[1]) == sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(tensors[0] + tensors[1]) > 6
    for path in alone.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(split / path.name).keys()
        assert path.stat().st_size == (split / path.name).stat().st_size
    assert local_io(groups[2] / "split").restore().step == 10


def test_where_one_rank_cannot_write_its_part_there_is_no_checkpoint_and_all_say_so(groups):
    said = [(groups[2] / f"unkept-{rank}.txt").read_text() for rank in range(2)]
    assert said[1] == "this rank's disk is full"
    assert said[0].endswith("is not complete, worker 1: this rank's disk is full")
    assert local_io(groups[2] / "unkept").store.newest() is None


def test_shards_that_cannot_be_shared_evenly_are_refused(tmp_path):
    io = local_io(tmp_path, world_size=3)
    with pytest.raises(ValueError, match="num_shards must be a multiple of the 3 workers where training is sharded"):
        post_train(run_config(sharded=True), pixels(), pixels(24, seed=1), io)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(groups, world):
    errors = [pickle.loads((groups[world] / f"error-{rank}.pickle").read_bytes()) for rank in range(world)]
    culprit = next(rank for rank in range(world) if BAD_SHARD in SHARDS[world][rank])
    assert all(isinstance(error, NonFiniteLossError) for error in errors)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert f"loss is not finite on ranks [{culprit}] at step {BAD_STEP} (last checkpoint: " in str(errors[0])
    (checkpoint,) = (groups[world] / "bad" / "checkpoints").iterdir()
    assert f"checkpoints/{checkpoint.name}" in str(errors[0])
    assert json.loads((checkpoint / "manifest.json").read_text())["meta"]["step"] == 10


def test_the_last_checkpoint_before_a_bad_image_is_that_of_a_healthy_run(groups, tmp_path):
    healthy = post_train(run_config(steps=10), latents(800), latents(24, seed=1), local_io(tmp_path))
    kept = local_io(groups[1] / "bad").restore()
    assert kept is not None
    assert differences(kept, healthy) == []
    assert all(torch.isfinite(value).all() for value in parts(kept).values())
