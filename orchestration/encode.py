"""The encoding of images to latents on Ray Data: any number of workers, the same bytes, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from orchestration.given import local_codec, local_encoders
from orchestration.launch import RunFailedError
from orchestration.parts import Parts, parts_of
from orchestration.storage import Storage
from workers.codecs import CodecConfig
from workers.data import Split
from workers.disk import scratch_directory
from workers.encode import TRANSFORM, Encoder, Images, Plan, Recipe, Shard, plan_encoding
from workers.manifest import Manifest, canonical_hash
from workers.shards import Statistics, captions_path, shard_path, write_statistics
from workers.sources import Place

log = logging.getLogger(__name__)
MAX_RETRIES = 3  # of a piece whose worker dies; Ray Data's own default is to try for ever
Tell = Callable[[str, int, int, Mapping[str, float]], None]


class Task(NamedTuple):
    """What a worker needs besides the shards.

    Attributes:
        recipe: of the shards.
        parts: where finished shards go.
        threads: that decode images.
        on_gpu: whether the models compute on a GPU.
    """

    recipe: Recipe
    parts: Parts
    threads: int
    on_gpu: bool


def encode(
    storage: Storage,
    path: str,
    settings: Images,
    codec: CodecConfig,
    *,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: int,
    tell: Tell,
    least_held_out: int = 1,
    about: Mapping[str, Any] | None = None,
) -> Manifest:
    """Encodes a source to a published directory of shards, on the cluster that this process has joined.

    What an earlier attempt at this path finished is kept, after its content was compared with its record.

    Args:
        storage: the workspace's.
        path: where the directory is published in it.
        settings: the images.
        codec: what encodes them.
        num_workers: like the next two asked of Ray, without a trace in the result.
        cpus_per_worker: also the threads that decode images.
        gpus_per_worker: 1 to compute on GPUs, 0 on CPUs.
        tell: told of the progress in images, as stage `data`.
        least_held_out: held-out images that must be readable.
        about: more for the manifest's meta.

    Raises:
        ValueError: the source, the settings or a model cannot be used, or too many images were unreadable: as soon as
            that is certain.
        RunFailedError: a worker failed.
    """
    start = time.monotonic()
    plan = plan_encoding(local_encoders(settings), codec)
    # Each worker brings the models to its own machine.
    plan = plan._replace(recipe=plan.recipe._replace(settings=settings))
    parts = parts_of(storage, path)
    task = Task(plan.recipe, parts, max(1, int(cpus_per_worker)), gpus_per_worker > 0)
    # Closed before anybody leaves the cluster: what Ray Data tidies up later would start a cluster of its own.
    with closing(_run(plan, task, num_workers, cpus_per_worker, gpus_per_worker)) as answers:
        found = _follow(answers, plan, least_held_out, tell)
    meta = {
        "source": settings.source,
        "transform": TRANSFORM,
        "codec": codec.description,
        "num_images": sum(len(shard.places) for shard in plan.shards),
        "fingerprint": plan.fingerprint,
        "num_unreadable": sum(len(record["unreadable"]) for record in found.values()),
        "classes": plan.classes,
        "seconds": time.monotonic() - start,
        **(about or {}),
    }
    return _commit(plan, parts, found, meta)


# ---------------------------------------------------------------------------------------------------- on the driver


def _run(plan: Plan, task: Task, num_workers: int, cpus: float, gpus: int) -> Any:
    """The workers' answers as they come."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says of errors is raised below
    pieces = _pieces(plan)
    # One piece a block, so that its answer comes when it is done.
    dataset = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=len(pieces))
    with warnings.catch_warnings():
        # Ray Data warns of every option of an actor that it has no name for, and has none for retries yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = dataset.map_batches(
            Worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(task,),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_task_retries=MAX_RETRIES,
        )
    rows: Any = iter(answers.iter_rows())
    try:
        for row in rows:
            yield json.loads(row["answer"])
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else type(error).__name__
        raise RunFailedError(f"encoding failed: {reason}; the same command goes on where it stopped") from error
    finally:
        rows.close()


def _pieces(plan: Plan) -> list[bytes]:
    """All work, the captions first, for which each worker holds text encoders beside its other models."""
    identity = plan.recipe.identity
    captions = {captions_path(Path(), number).name: part for number, part in enumerate(plan.caption_parts)}
    return [
        *(_piece(identity, name, captions=part) for name, part in captions.items()),
        *(_piece(identity, _name(shard), shard=shard) for shard in plan.shards),
    ]


def _piece(identity: Mapping[str, Any], name: str, **work: Any) -> bytes:
    """Work as bytes: a million paths in plain text would fill the object store."""
    digest = canonical_hash({"identity": identity, "name": name, **work})
    return zlib.compress(json.dumps({"name": name, "digest": digest, **work}).encode(), 1)


def _name(shard: Shard) -> str:
    return shard_path(Path(), shard.split, shard.number).name


def _follow(answers: Any, plan: Plan, least_held_out: int, tell: Tell) -> dict[str, dict[str, Any]]:
    """Every piece's record by its file's name, while enough can still become of the rest."""
    shards = {_name(shard): shard for shard in plan.shards}
    images = {name: len(shard.places) for name, shard in shards.items()}
    left = Counter(label for shard in plan.shards if shard.split == "train" for label in shard.labels)
    found: dict[str, dict[str, Any]] = {}
    total, done, encoded, unreadable, start = sum(images.values()), 0, 0, 0, 0.0
    for answer in answers:
        if "error" in answer:
            raise (ValueError if answer["is_input"] else RunFailedError)(answer["error"])
        name, record = answer["name"], answer["record"]
        if answer["why_again"]:
            log.warning("%s is encoded again: %s", name, answer["why_again"])
        found[name] = record
        unreadable += len(record["unreadable"])
        if record["unreadable"]:
            if shards[name].split == "train":
                label_of = {place.name: label for place, label in zip(*shards[name][2:], strict=True)}
                left.subtract(label_of[image] for image, _ in record["unreadable"])
            _check_left(plan, found, least_held_out, left)
        done += images.get(name, 0)
        metrics = {"encode/unreadable": float(unreadable)}
        if start:
            encoded += images.get(name, 0) if answer["is_new"] else 0
            metrics["encode/images_per_s"] = encoded / (time.monotonic() - start)
        else:  # the first answer waited for workers to start, and counts for the time that follows
            start = time.monotonic()
        tell("data", done, total, metrics)
    return found


def _unreadable(plan: Plan, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The unreadable images known so far, in the order of the rows."""
    return [
        {"split": shard.split, "name": name, "reason": reason}
        for shard in plan.shards
        for name, reason in found.get(_name(shard), {}).get("unreadable", ())
    ]


def _check_left(
    plan: Plan, found: Mapping[str, Mapping[str, Any]], least_held_out: int, left: Mapping[int, int]
) -> None:
    """Whether the unreadable images known so far leave what is needed; `left` are training images of each label."""
    bad, settings = _unreadable(plan, found), plan.recipe.settings
    if len(bad) > settings.max_unreadable:
        images = sum(len(shard.places) for shard in plan.shards if _name(shard) in found)
        raise ValueError(
            f"data.images.max_unreadable must be at least the number of unreadable images, got "
            f"{settings.max_unreadable} and {len(bad)} of the first {images} images: {_such(bad)}; raise it, which "
            "keeps what is encoded already, or mend them"
        )
    held_out = [image for image in bad if image["split"] == "held_out"]
    if settings.held_out - len(held_out) < least_held_out:
        raise ValueError(
            f"data.images.held_out must leave at least {least_held_out} readable images, got {settings.held_out} with "
            f"{len(held_out)} unreadable: {_such(held_out)}; mend them, or raise it"
        )
    absent = sorted(label for label, count in left.items() if not count)
    if absent and not plan.captions:
        label = absent[0]
        named = f" ({plan.classes[label]})" if plan.classes else ""
        raise ValueError(
            f"data.images.source must have a readable training image of every class, got none of class {label}{named}; "
            "mend them, or add some"
        )


def _such(bad: Sequence[Mapping[str, str]]) -> str:
    """The first few of them."""
    first = ", ".join(f"{image['name']} ({image['reason']})" for image in bad[:3])
    return first + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


def _commit(plan: Plan, parts: Parts, found: Mapping[str, Any], meta: Mapping[str, Any]) -> Manifest:
    """Adds up the statistics in the order of the shards and publishes all."""
    statistics: dict[Split, list[Statistics]] = {"train": [], "held_out": []}
    for shard in plan.shards:
        record = found[_name(shard)]
        if record["statistics"]:
            statistics[shard.split].append(_statistics(record["statistics"]))
    empty = next((split for split, of_split in statistics.items() if not of_split), None)
    if empty:
        raise ValueError(
            f"data.images.source must have a readable image for each split, got none for {empty}; mend the images"
        )
    with scratch_directory() as scratch:
        write_statistics(statistics, scratch)
        (scratch / "unreadable.json").write_text(json.dumps(_unreadable(plan, found), indent=1))
        return parts.commit(found, scratch, meta)


def _statistics(record: Mapping[str, Any]) -> Statistics:
    return Statistics(
        num_images=record["num_images"],
        sums=tuple(record["sums"]),
        squares=tuple(record["squares"]),
        per_class={int(label): count for label, count in record["per_class"].items()},
        per_channel=record["per_channel"],
    )


# ----------------------------------------------------------------------------------------------------- on a worker


class Worker:
    """What Ray Data starts: takes pieces of work, leaves files and records in the storage, answers in JSON."""

    def __init__(self, task: Task) -> None:
        import torch

        self.task = task
        device = torch.device("cuda" if task.on_gpu else "cpu")
        recipe = task.recipe._replace(
            settings=local_encoders(task.recipe.settings), codec=local_codec(task.recipe.codec)
        )
        self.encoder = Encoder(recipe, device, task.threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One piece; what went wrong is part of the answer, in one line."""
        try:
            answer = self.do(json.loads(zlib.decompress(batch["piece"][0].as_py())))
        except (ValueError, OSError, ArithmeticError) as error:
            answer = {"error": " ".join(str(error).split()), "is_input": isinstance(error, ValueError)}
        return pa.table({"answer": [json.dumps(answer)]})

    def do(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes a piece, unless its record says that it is done and its content is what the record says."""
        name, digest = piece["name"], piece["digest"]
        record, why_again = self.task.parts.finished(name, digest, may_be_empty=True)
        if record is not None:
            return {"name": name, "record": record, "is_new": False, "why_again": ""}
        with scratch_directory() as scratch:
            about = self._encode(piece, scratch)
            record = self.task.parts.keep(name, digest, scratch / name, about)
        return {"name": name, "record": record, "is_new": True, "why_again": why_again}

    def _encode(self, piece: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        if "captions" in piece:
            self.encoder.encode_captions(piece["captions"], directory / piece["name"])
            return {"statistics": None, "unreadable": []}
        split, number, places, labels = piece["shard"]
        encoded = self.encoder.encode(
            Shard(split, number, [Place(*place) for place in places], labels), directory / piece["name"]
        )
        statistics = asdict(encoded.statistics) if encoded.statistics else None
        return {"statistics": statistics, "unreadable": encoded.unreadable}
