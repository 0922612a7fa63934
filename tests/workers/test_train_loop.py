"""The loop against a hand-written one, and where it stops."""

from __future__ import annotations

import itertools
import pickle
import time

import numpy as np
import pytest
import torch
from worker_toys import differences, latents, local_io, parts, pixels, run_config

from mixflow_core.correctives import TrainingCorrective
from mixflow_core.rng import generator
from workers.checkpoint import TrainState
from workers.data import batch_rows, shard_batch
from workers.io import StoppedError
from workers.models.sit import SiT
from workers.train import NonFiniteLossError, held_out_loss, post_train


def random_weights(run, seed=5):
    """Weights with no zeros in them: at the published start most gradients are exactly zero."""
    numbers = torch.Generator().manual_seed(seed)
    weights = SiT(run.model).state_dict()
    return {
        name: value if name == "pos_embed" else 0.2 * torch.randn(value.shape, generator=numbers)
        for name, value in weights.items()
    }


def test_the_loop_is_adamw_on_algorithm_1_and_a_warmed_up_average(tmp_path):
    run = run_config(
        steps=4, checkpoint_every=4, weight_decay=0.1, adam_beta2=0.95, grad_clip=0.5, learning_rate=1e-3, ema_decay=0.4
    )
    start, data = random_weights(run), pixels()
    rows = []
    io = local_io(tmp_path, report=lambda step, metrics: rows.append((step, dict(metrics))))
    state = post_train(run, data, pixels(24, seed=1), io, initial=start)

    # By hand, in float64: pairs, mean squared error, clipping, decoupled weight decay, Adam's moments, average.
    model = SiT(run.model).double()
    model.load_state_dict(start)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [model.get_parameter(name) for name in names]
    averages = [w.detach().clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    losses, norms = [], []
    for step in range(1, 5):
        shards = [shard_batch(run, data, step - 1, shard) for shard in range(8)]
        x1, y, x0, u = (torch.cat([getattr(s, key) for s in shards]) for key in ("x1", "y", "x0", "u"))
        x1, x0, u = x1.double(), x0.double(), u.double()
        t = u[:, 0] ** 0.5
        m = t - 0.8 * t * u[:, 1]
        where = m[:, None, None, None]
        loss = ((model(where * x1 + (1 - where) * x0, t, y) - (x1 - x0)) ** 2).mean()
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        losses.append(loss.item())
        norms.append(norm.item())
        decay = min(0.4, (1 + step) / (10 + step))
        for w, g, a, b, average in zip(weights, gradients, first, second, averages, strict=True):
            g = g * min(1.0, 0.5 / norm.item())
            a.mul_(0.9).add_(0.1 * g)
            b.mul_(0.95).add_(0.05 * g * g)
            with torch.no_grad():
                w.mul_(1 - 1e-3 * 0.1)
                w.sub_(1e-3 * (a / (1 - 0.9**step)) / ((b / (1 - 0.95**step)).sqrt() + 1e-8))
                average.mul_(decay).add_((1 - decay) * w)

    assert min(norms) > 0.5, "the clipping has work to do"
    assert [row["train/loss"] for row in state.history[:4]] == pytest.approx(losses, rel=1e-4)
    assert [row["train/grad_norm"] for row in state.history[:4]] == pytest.approx(norms, rel=1e-4)
    for name, w, average, a, b in zip(names, weights, averages, first, second, strict=True):
        if name.endswith("qkv.bias"):
            continue  # softmax ignores the keys' bias: its gradient is rounding alone, which Adam makes large
        close = {"rtol": 1e-3, "atol": 2e-6}  # four steps move weights by 4e-3
        torch.testing.assert_close(state.model[name].double(), w.detach(), **close, msg=name)
        torch.testing.assert_close(state.ema[name].double(), average, **close, msg=name)
        torch.testing.assert_close(state.optimizer[f"exp_avg/{name}"].double(), a, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(state.optimizer[f"exp_avg_sq/{name}"].double(), b, rtol=2e-3, atol=1e-8)
        assert not torch.equal(state.model[name], start[name])
    assert torch.equal(state.ema["pos_embed"], start["pos_embed"])
    assert [step for step, _ in rows] == [1, 2, 3, 4, 4]
    assert all(metrics["time/images_per_s"] > 0 for _, metrics in rows[:4])


def test_correctives_change_the_input_alone(tmp_path):
    """Input Perturbation and the one-step self-rollout by hand, in float64, with weights that stand still."""
    corrective = {"input_perturbation": 0.3, "rollout_share": 0.8, "rollout_step": 0.2, "rollout_ramp": 0.5}
    run = run_config(steps=8, checkpoint_every=8, learning_rate=1e-12)
    run = run.model_copy(update={"corrective": TrainingCorrective(**corrective)})
    start, data = random_weights(run), pixels()
    state = post_train(run, data, pixels(24, seed=1), local_io(tmp_path / "whole"), initial=start)
    model = SiT(run.model).double()
    model.load_state_dict(start)
    losses, replaced = [], 0
    for step in range(8):
        shards = [shard_batch(run, data, step, shard) for shard in range(8)]
        names = ("x1", "y", "x0", "u", "more_noise", "u_rollout")
        x1, y, x0, u, noise, choice = (torch.cat([getattr(s, key) for s in shards]).double() for key in names)
        y = y.long()
        t = u[:, 0] ** 0.5
        m = t - 0.8 * t * u[:, 1]
        s = (m - 0.2).clamp(min=0)
        at = [value[:, None, None, None] for value in (m, s)]
        x_m, x_s = (where * x1 + (1 - where) * x0 for where in at)
        with torch.no_grad():
            own = x_s + (at[0] - at[1]) * model(x_s, s, y)
        rolled = choice < 0.8 * min(step / 8 / 0.5, 1)
        replaced += int(rolled.sum())
        x = torch.where(rolled[:, None, None, None], own, x_m) + 0.3 * (1 - at[0]) * noise
        losses.append(((model(x, t, y) - (x1 - x0)) ** 2).mean().item())
    assert [row["train/loss"] for row in state.history if "train/loss" in row] == pytest.approx(losses, rel=1e-5)
    assert 0 < replaced < 8 * 16
    # What is held out is looked at without correctives.
    plain = run_config(steps=8, checkpoint_every=8, learning_rate=1e-12)
    other = post_train(plain, data, pixels(24, seed=1), local_io(tmp_path / "plain"), initial=start)
    assert state.history[-1]["eval/loss"] == pytest.approx(other.history[-1]["eval/loss"], rel=1e-6)


def test_the_held_out_loss_is_that_of_the_average_on_unseen_images(tmp_path):
    """Zero weights predict zero, so the loss is the mean square of x1 - x0, about that of the data plus one."""
    run = run_config(steps=1, checkpoint_every=1, learning_rate=1e-9)
    zero = {name: torch.zeros_like(value) for name, value in SiT(run.model).state_dict().items()}
    held_out = pixels(600, seed=1)
    state = post_train(run, pixels(), held_out, local_io(tmp_path), initial=zero)
    expected = float((np.float64(held_out.images[:512]) / 127.5 - 1).__pow__(2).mean()) + 1
    assert state.history[-1]["eval/loss"] == pytest.approx(expected, rel=0.02)


def test_the_held_out_loss_is_taken_with_the_averaged_weights(tmp_path):
    run, held_out = run_config(steps=10), pixels(24, seed=1)
    state = post_train(run, pixels(), held_out, local_io(tmp_path))
    numbers = generator(0, "eval", 0)
    x0, u = torch.randn(24, 1, 8, 8, generator=numbers).double(), torch.rand(24, 2, generator=numbers).double()
    t = (((torch.randperm(24, generator=numbers) + 0.5) / 24).double()) ** 0.5
    m = t - 0.8 * t * u[:, 1]
    where, x1 = m[:, None, None, None], torch.from_numpy(held_out.images / 127.5 - 1)

    def loss(weights):
        model = SiT(run.model)
        model.load_state_dict(weights)
        with torch.no_grad():
            out = model.double()(where * x1 + (1 - where) * x0, t, torch.from_numpy(held_out.labels))
        return float(((out - (x1 - x0)) ** 2).mean())

    assert state.history[-1]["eval/loss"] == pytest.approx(loss(state.ema), rel=1e-5)
    assert abs(loss(state.model) - loss(state.ema)) > 1e-3 * loss(state.ema), "the average lags behind"


def test_metrics_are_means_over_their_window(tmp_path):
    held_out = pixels(24, seed=1)
    each = post_train(run_config(steps=12, checkpoint_every=6), pixels(), held_out, local_io(tmp_path / "each"))
    run = run_config(steps=12, checkpoint_every=6, log_every=3)
    third = post_train(run, pixels(), held_out, local_io(tmp_path / "third"))
    losses = [row["train/loss"] for row in each.history if "train/loss" in row]
    rows = [row for row in third.history if "train/loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["train/loss"] for row in rows] == pytest.approx([np.mean(losses[i : i + 3]) for i in (0, 3, 6, 9)])


def test_a_run_stopped_between_checkpoints_goes_on_exactly(tmp_path):
    class Stopped(Exception):
        pass

    def stop_at_27(step, metrics):
        if step == 27:
            raise Stopped

    run, held_out = run_config(log_every=3, checkpoint_every=6), pixels(24, seed=1)
    whole = post_train(run, pixels(), held_out, local_io(tmp_path / "whole"))
    io = local_io(tmp_path / "stopped", report=stop_at_27)
    with pytest.raises(Stopped):
        post_train(run, pixels(), held_out, io)
    io.wait()
    assert io.restore().step == 24
    assert differences(post_train(run, pixels(), held_out, local_io(tmp_path / "stopped")), whole) == []


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_run_asked_to_stop_keeps_its_last_step_and_goes_on_exactly(tmp_path, reproducible):
    run, held_out = (
        run_config(steps=30, log_every=5, checkpoint_every=10, reproducible=reproducible),
        pixels(24, seed=1),
    )
    whole = post_train(run, pixels(), held_out, local_io(tmp_path / "whole"))
    # During a step of the middle of a window, at a checkpoint, in the first step, before the last one.
    for number, asked in enumerate((13, 20, 1, 29)):
        directory, steps = tmp_path / f"stopped-{number}", itertools.count(1)
        with pytest.raises(StoppedError, match=f"stopped after step {asked}, whose state is kept"):
            post_train(run, pixels(), held_out, local_io(directory, stopping=lambda a=asked, s=steps: next(s) >= a))
        assert local_io(directory).restore().step == asked
        assert len([name for name in local_io(directory).store.names() if int(name[5:14]) == asked]) == 1
        assert differences(post_train(run, pixels(), held_out, local_io(directory)), whole) == []


def test_a_run_that_is_stopped_at_every_step_still_ends_and_ends_the_same(tmp_path):
    run, held_out = run_config(steps=12, log_every=4, checkpoint_every=4), pixels(24, seed=1)
    whole = post_train(run, pixels(), held_out, local_io(tmp_path / "whole"))
    for step in range(1, 12):
        with pytest.raises(StoppedError, match=f"after step {step},"):
            post_train(run, pixels(), held_out, local_io(tmp_path / "often", stopping=lambda: True))
    last = post_train(run, pixels(), held_out, local_io(tmp_path / "often", stopping=lambda: True))
    assert differences(last, whole) == []


def test_checkpoints_without_a_score_are_never_the_best(tmp_path):
    run, held_out = run_config(steps=30, log_every=5, checkpoint_every=10), pixels(24, seed=1)
    for _ in range(4):
        with pytest.raises(StoppedError):
            post_train(run, pixels(), held_out, local_io(tmp_path, keep=1, stopping=lambda: True))
    assert [name[5:14] for name in local_io(tmp_path).store.names()] == ["000000004"]
    post_train(run, pixels(), held_out, local_io(tmp_path, keep=1))
    scored = {name[5:14] for name in local_io(tmp_path).store.names()}
    assert "000000030" in scored
    assert "000000004" not in scored


def test_a_finished_run_started_again_returns_what_it_was(tmp_path):
    run, held_out = run_config(steps=10), pixels(24, seed=1)
    first = post_train(run, pixels(), held_out, local_io(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert differences(post_train(run, pixels(), held_out, local_io(tmp_path)), first) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_another_seed_gives_another_run(tmp_path):
    a, b = (
        post_train(run_config(steps=10, seed=seed), pixels(), pixels(24, seed=1), local_io(tmp_path / str(seed)))
        for seed in (7, 8)
    )
    assert set(differences(a, b)) >= {"history", "model/final_layer.linear.weight"}


def test_nan_weights_stop_the_run_at_once(tmp_path):
    run = run_config()
    start = random_weights(run)
    start["final_layer.linear.bias"][0] = float("nan")
    with pytest.raises(NonFiniteLossError) as caught:
        post_train(run, pixels(), pixels(24, seed=1), local_io(tmp_path), initial=start)
    assert str(caught.value) == (
        "loss is not finite on ranks [0] at step 0 (last checkpoint: none); stopped before the update"
    )


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_finite_loss_with_an_infinite_gradient_stops_the_run(tmp_path, reproducible):
    run = run_config(reproducible=reproducible)
    start = random_weights(run)
    start["final_layer.linear.weight"] *= 1e18  # outputs of 1e18 have a finite square, the gradient behind them none
    with pytest.raises(NonFiniteLossError) as caught:
        post_train(run, pixels(), pixels(24, seed=1), local_io(tmp_path), initial=start)
    assert str(caught.value) == (
        "gradient, the sum over all ranks, is not finite at step 0 (last checkpoint: none); stopped before the update"
    )
    assert caught.value.ranks == []


@pytest.mark.parametrize("bad", [float("inf"), 1e30])
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_bad_image_stops_the_run_before_the_update_it_would_spoil(tmp_path, monkeypatch, reproducible, bad):
    run, data = run_config(reproducible=reproducible), latents(800)
    data.images[batch_rows(run.seed, 13 * 16 + 5, 1, 800)[0], 0, 0, 0] = bad  # first drawn at step 13
    updates, update = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(1) or update(self))
    with pytest.raises(NonFiniteLossError) as caught:
        post_train(run, data, latents(24, seed=1), local_io(tmp_path))
    assert "on ranks [0] at step 13 (last checkpoint: checkpoints/step-000000010-" in str(caught.value)
    assert len(updates) == 13
    kept = local_io(tmp_path).restore()
    assert kept.step == 10
    assert all(torch.isfinite(value).all() for value in parts(kept).values())


def test_the_error_names_the_checkpoint_that_is_still_being_written(tmp_path, monkeypatch):
    run, data = run_config(), latents(800)
    data.images[batch_rows(run.seed, 10 * 16, 1, 800)[0]] = float("inf")  # right after the checkpoint of step 10
    write = TrainState.write_tensors

    def slow(*args):
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(TrainState, "write_tensors", slow)
    with pytest.raises(NonFiniteLossError, match=r"at step 10 \(last checkpoint: checkpoints/step-000000010-"):
        post_train(run, data, latents(24, seed=1), local_io(tmp_path))


def test_the_error_survives_pickling():
    error = NonFiniteLossError(3, [0, 2], "checkpoints/step-000000002-ab")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.step, copy.ranks, copy.last_checkpoint) == (3, [0, 2], "checkpoints/step-000000002-ab")
    assert (
        str(copy)
        == str(error)
        == (
            "loss is not finite on ranks [0, 2] at step 3 (last checkpoint: checkpoints/step-000000002-ab); "
            "stopped before the update"
        )
    )


@pytest.mark.parametrize("computed_again", [False, True])
def test_compiled_blocks_are_compiled_whatever_is_kept_of_them(tmp_path, monkeypatch, computed_again):
    graphs, compiler = [], torch.compile

    def take(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda block: compiler(block, backend=take))
    torch._dynamo.reset()
    io = local_io(tmp_path)
    run = run_config(steps=1, checkpoint_every=1, compile=True, activation_checkpointing=computed_again)
    state = post_train(run, pixels(), pixels(24, seed=1), io)
    assert graphs
    plain = post_train(run_config(steps=1, checkpoint_every=1), pixels(), pixels(24, seed=1), local_io(tmp_path / "b"))
    for name, value in state.model.items():
        torch.testing.assert_close(value, plain.model[name], msg=name)


def test_the_held_out_loss_asks_for_no_more_images_at_once_than_training(tmp_path):
    """And comes to the same: 24 images in 8 shards, one image of a shard at a time or all of them."""
    found = []
    for shards_per_pass in (1, 0):
        run = run_config(global_batch_size=8, shards_per_pass=shards_per_pass)
        model, sizes = SiT(run.model).initialise(0), []
        model.register_forward_pre_hook(lambda module, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        found.append(held_out_loss(run, model, pixels(24, seed=1), local_io(tmp_path), torch.device("cpu")))
        assert set(sizes) == {1 if shards_per_pass else 3}
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("shards_per_pass", [0, 2])
def test_shards_gathered_in_bf16_train_as_whole_weights_do(tmp_path, shards_per_pass):
    """On one worker to the bit: autocast would have rounded the same weights."""
    settings = {"steps": 3, "checkpoint_every": 3, "precision": "bf16", "shards_per_pass": shards_per_pass}
    try:
        states = [
            post_train(run_config(**settings, sharded=sharded), pixels(), pixels(24, seed=1), local_io(tmp_path / kind))
            for kind, sharded in (("whole", False), ("sharded", True))
        ]
        assert not differences(*states)
    finally:
        torch.distributed.destroy_process_group()
