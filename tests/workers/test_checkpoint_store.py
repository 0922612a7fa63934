"""Checkpoints: only complete and unaltered ones are restored, and what is written is what was saved."""

from __future__ import annotations

import json
import logging
import threading

import pytest
import torch
from worker_toys import differences, local_io, pixels, run_config

from orchestration.local_storage import LocalStorage
from orchestration.storage import open_storage
from workers.checkpoint import CheckpointStore, TrainState
from workers.disk import NoRoomError
from workers.manifest import CorruptError, Manifest
from workers.train import post_train


def state_at(step: int) -> TrainState:
    tensors = {"a": torch.full((3, 4), float(step)), "b": torch.arange(5) * step}
    moments = {f"{key}/a": torch.full((3, 4), step + 0.5) for key in ("exp_avg", "exp_avg_sq")}
    return TrainState(step, tensors, {"a": tensors["a"] / 2, "b": tensors["b"]}, moments, [{"step": step, "x": 0.1}])


def store_in(directory, keep=99):
    return CheckpointStore(open_storage(str(directory)), "runs/r1", keep=keep, about={"experiment": "toy"})


def saved(directory, steps, scores=None, keep=99):
    store = store_in(directory, keep)
    for step, score in zip(steps, scores or [1.0] * len(steps), strict=True):
        store.save(state_at(step), score)
    store.wait()
    return store


def at_step(directory, step):
    (found,) = (directory / "runs/r1").glob(f"step-{step:09d}-*")
    return found


def alter(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SPOILT = {
    "torn": (lambda d: (d / "manifest.json").unlink(), "interrupted"),
    "altered": (lambda d: alter(d / "ema.safetensors"), "ema.safetensors"),
    "truncated": (lambda d: (d / "model.safetensors").write_bytes(b"12345678"), "model.safetensors"),
    "missing": (lambda d: (d / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
    "manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json"),
    "history": (lambda d: alter(d / "history.jsonl"), "history.jsonl"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_checkpoint_is_set_aside_and_the_one_before_is_restored(tmp_path, caplog, kind):
    saved(tmp_path, [10, 20, 30])
    spoil, named = SPOILT[kind]
    spoil(at_step(tmp_path, 30))
    with caplog.at_level(logging.WARNING, "workers.checkpoint"):
        assert differences(store_in(tmp_path).restore(), state_at(20)) == []
    (message,) = [r.getMessage() for r in caplog.records if r.name == "workers.checkpoint"]
    assert at_step(tmp_path, 30).name in message
    assert named in message
    assert "\n" not in message
    assert (at_step(tmp_path, 30) / "set-aside.json").exists()

    caplog.clear()
    again = store_in(tmp_path)
    assert differences(again.restore(), state_at(20)) == []
    assert again.newest() == f"runs/r1/{at_step(tmp_path, 20).name}"
    assert not caplog.records, "set aside once, not again"


def test_nothing_is_restored_where_none_is_there_or_all_are_torn(tmp_path):
    assert store_in(tmp_path / "empty").restore() is None
    assert store_in(tmp_path / "empty").newest() is None
    saved(tmp_path, [10, 20])
    for step in (10, 20):
        (at_step(tmp_path, step) / "manifest.json").unlink()
    assert store_in(tmp_path).restore() is None
    assert store_in(tmp_path).newest() is None


def test_a_machine_that_reads_every_checkpoint_as_altered_loses_none(tmp_path, monkeypatch):
    """With broken memory or a proxy that alters what passes, training must not begin anew."""
    saved(tmp_path, [10, 20])

    def altering(self, path, into):
        raise CorruptError(path, "model.safetensors", "has another SHA-256 than its manifest says")

    def unreadable(self, path):
        return None

    for method, broken_one in (("fetch", altering), ("manifest", unreadable)):
        with monkeypatch.context() as broken:
            broken.setattr(LocalStorage, method, broken_one)
            with pytest.raises(OSError, match=r"every checkpoint in .*/runs/r1 reads as altered on this machine"):
                store_in(tmp_path).restore()
    assert differences(store_in(tmp_path).restore(), state_at(20)) == []


def test_what_a_kill_tore_is_removed_once_a_later_step_is_kept(tmp_path):
    saved(tmp_path, [10, 20])
    (at_step(tmp_path, 20) / "manifest.json").unlink()
    store = store_in(tmp_path)
    assert store.restore().step == 10
    store.save(state_at(30), 1.0)
    store.wait()
    assert [int(path.name.split("-")[1]) for path in sorted((tmp_path / "runs/r1").iterdir())] == [10, 30]


def test_a_store_that_lists_no_uploads_is_no_obstacle(tmp_path, monkeypatch, caplog):
    saved(tmp_path, [10])

    def refused(self, prefix, older_s=0):
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(LocalStorage, "discard_unfinished", refused)
    assert differences(store_in(tmp_path).restore(), state_at(10)) == []
    assert "AccessDenied" in caplog.text


def test_a_second_attempt_at_a_torn_step_has_its_own_directory(tmp_path):
    saved(tmp_path, [10, 20])
    torn = at_step(tmp_path, 20)
    (torn / "manifest.json").unlink()
    store = store_in(tmp_path)
    assert store.restore().step == 10
    store.save(state_at(20), 1.0)
    store.wait()
    assert store.restore().step == 20
    assert len(list((tmp_path / "runs/r1").glob("step-000000020-*"))) == 2
    assert not (torn / "manifest.json").exists()


def test_steps_are_compared_as_numbers(tmp_path):
    saved(tmp_path, [900, 1000, 99_999, 100_000])
    assert store_in(tmp_path).restore().step == 100_000


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([5.0, 1.0, 4.0, 3.0, 2.0], [20, 40, 50]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [40, 50]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [10, 40, 50]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, scores, kept):
    saved(tmp_path, [10, 20, 30, 40, 50], scores, keep=2)
    assert [int(path.name.split("-")[1]) for path in sorted((tmp_path / "runs/r1").iterdir())] == kept


def test_a_spoilt_best_does_not_count_among_those_kept(tmp_path):
    saved(tmp_path, [10, 20, 30], [1.0, 2.0, 3.0], keep=2)
    open_storage(str(tmp_path)).set_aside(f"runs/r1/{at_step(tmp_path, 10).name}", "test")
    saved(tmp_path, [40], [4.0], keep=2)
    assert {m.meta["step"] for m in manifests(tmp_path)} == {20, 30, 40}


def manifests(directory) -> list[Manifest]:
    store = store_in(directory)
    found = [store.files.manifest(f"runs/r1/{name}") for name in store.names()]
    return [manifest for manifest in found if manifest]


class Gate:
    """Storage that writes only once it is let through."""

    def __init__(self, inner):
        self.inner, self.open = inner, threading.Event()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def put_file(self, *args):
        assert self.open.wait(30)
        return self.inner.put_file(*args)


class Broken:
    """Storage that cannot write."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def put_file(self, *args):
        raise OSError("PUT s3://bucket/x: the disk is full")


def test_later_updates_do_not_change_what_is_written(tmp_path, monkeypatch):
    write, gate = TrainState.write_tensors, threading.Event()
    monkeypatch.setattr(TrainState, "write_tensors", lambda *args: gate.wait(30) and write(*args))
    store, state = store_in(tmp_path), state_at(10)
    store.save(state, 1.0)
    for part in (state.model, state.ema, state.optimizer):
        for value in part.values():
            value.zero_()
    state.history.append({"step": 11})
    gate.set()
    store.wait()
    assert differences(store.restore(), state_at(10)) == []


def test_save_does_not_wait_for_its_own_writing_but_for_the_one_before(tmp_path):
    gate = Gate(open_storage(str(tmp_path)))
    store = CheckpointStore(gate, "runs/r1", keep=9, about={})
    store.save(state_at(10), 1.0)  # returns, although nothing can be written yet
    assert store.newest() is None
    second = threading.Thread(target=store.save, args=(state_at(20), 1.0), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive(), "only one checkpoint is in the air"
    gate.open.set()
    second.join(30)
    store.wait()
    assert {m.meta["step"] for m in manifests(tmp_path)} == {10, 20}


def test_an_error_of_the_writer_surfaces_once(tmp_path):
    store = CheckpointStore(Broken(open_storage(str(tmp_path))), "runs/r1", keep=9, about={})
    store.save(state_at(10), 1.0)
    with pytest.raises(OSError, match="the disk is full"):
        store.wait()
    store.wait()


def test_one_checkpoint_that_is_lost_is_a_warning_and_two_are_an_error(tmp_path, caplog):
    """A storage that was away for longer than it is waited for is there again, or it is not."""
    broken, sound = Broken(open_storage(str(tmp_path))), open_storage(str(tmp_path))
    store = CheckpointStore(broken, "runs/r1", keep=9, about={})
    for step, files in ((10, broken), (20, sound), (30, broken), (40, broken)):
        if step > 10:
            store._writer.join()
        store.files = files
        store.save(state_at(step), 1.0)
    store._writer.join()
    with pytest.raises(OSError, match="the disk is full"):
        store.save(state_at(50), 1.0)
    assert [m.meta["step"] for m in manifests(tmp_path)] == [20]
    assert len([r for r in caplog.records if "was not kept" in r.getMessage()]) == 2


def test_where_there_was_no_room_the_next_save_says_so_at_once(tmp_path, monkeypatch):
    def full(self, path, manifest):
        raise NoRoomError("the disk must have room")

    monkeypatch.setattr(LocalStorage, "commit", full)
    store = store_in(tmp_path)
    store.save(state_at(10), 1.0)
    with pytest.raises(NoRoomError):
        store.save(state_at(20), 1.0)
    assert store.names() == [], "what would fill the room that the next attempt needs"


def test_a_run_whose_checkpoints_cannot_be_written_fails(tmp_path):
    io = local_io(tmp_path)
    io.store.files = Broken(io.store.files)
    with pytest.raises(OSError, match="the disk is full"):
        post_train(run_config(steps=10), pixels(), pixels(24, seed=1), io)


def test_a_checkpoint_of_a_run_is_complete_self_describing_and_free_of_pickle(tmp_path):
    state = post_train(run_config(steps=10), pixels(), pixels(24, seed=1), local_io(tmp_path))
    (directory,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in directory.iterdir()) == [
        "ema.safetensors",
        "history.jsonl",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "run.json",
    ]
    assert json.loads((directory / "run.json").read_text()) == {"name": "toy", "step": 10, "loss_sum": 0.0}
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert rows == state.history
    for name in ("model", "ema", "optimizer"):
        # The format by hand: length of the header, the header in JSON, then raw numbers.
        content = (directory / f"{name}.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        assert header.keys() == getattr(state, name).keys()
        for key, value in getattr(state, name).items():
            start, end = header[key]["data_offsets"]
            assert content[8 + size + start : 8 + size + end] == value.numpy().tobytes()
    assert differences(local_io(tmp_path).restore(), state) == []


def test_tensors_are_cut_into_files_at_their_limit_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.checkpoint.FILE_BYTES", 48)
    state = state_at(10)  # of 48 and 40 bytes, and of 48 twice
    assert {file: names for file, (_, names) in state.files().items()} == {
        "model-00001-of-00002.safetensors": ["a"],
        "model-00002-of-00002.safetensors": ["b"],
        "ema-00001-of-00002.safetensors": ["a"],
        "ema-00002-of-00002.safetensors": ["b"],
        "optimizer-00001-of-00002.safetensors": ["exp_avg/a"],
        "optimizer-00002-of-00002.safetensors": ["exp_avg_sq/a"],
    }
    assert differences(saved(tmp_path, [10]).restore(), state) == []


def test_no_scratch_directory_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    store = saved(tmp_path / "store", [10, 20])
    store.restore()
    assert list((tmp_path / "scratch").iterdir()) == []
