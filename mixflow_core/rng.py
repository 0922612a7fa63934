"""Counter-based randomness: every random number is a function of its position, never of what ran before."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import torch

Stream = Literal[
    "order",
    "time",
    "noise",
    "dropout",
    "corrective",
    "posterior",
    "init",
    "eval",
    "sample_noise",
    "sample_label",
    "sde_noise",
    "pairing",
]

_POSITIONS = 2**32


def generator(seed: int, stream: Stream, position: int) -> torch.Generator:
    """A CPU generator for one position of one stream.

    torch seeds its CPU generator with the low 32 bits of what it is given, so keys are not hashed (hashes of millions
    of positions would collide in 32 bits): within one (seed, stream) the map from position to key is a bijection, and
    no two positions share their numbers.

    Args:
        seed: any non-negative integer.
        stream: which use the numbers have; streams of one seed are keyed independently.
        position: in [0, 2**32): step * num_shards + shard in training, the image's index in sampling.

    Raises:
        ValueError: the position does not fit.
    """
    if not 0 <= position < _POSITIONS:
        raise ValueError(f"position must lie in [0, 2**32), got {position}")
    before, after = _stream_key(seed, stream)
    key = _scramble(position ^ before) ^ after
    return torch.Generator().manual_seed(key)


def shard_position(step: int, shard: int, num_shards: int) -> int:
    """Position of a logical shard of a training step."""
    return step * num_shards + shard


@lru_cache(maxsize=64)
def _stream_key(seed: int, stream: Stream) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _scramble(word: int) -> int:
    """A bijection of 32-bit words whose output bits all depend on all input bits (MurmurHash3's finaliser)."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % _POSITIONS
    word ^= word >> 13
    word = word * 0xC2B2AE35 % _POSITIONS
    return word ^ word >> 16
