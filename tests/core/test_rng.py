"""Every number is a function of its position, and no two positions share theirs."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from mixflow_core.rng import Stream, generator, shard_position


def numbers(seed, stream, position, n=8):
    return torch.rand(n, generator=generator(seed, stream, position))


def test_no_two_of_a_million_positions_share_a_key():
    keys = {generator(3, "noise", position).initial_seed() for position in range(2**20)}
    assert len(keys) == 2**20
    assert max(keys) < 2**32  # torch's CPU generator would drop higher bits


def test_far_positions_have_their_own_keys_too():
    positions = np.random.default_rng(0).integers(0, 2**32, 100_000)
    keys = {generator(0, "time", int(p)).initial_seed() for p in positions}
    assert len(keys) == len(set(positions.tolist()))


def test_the_same_position_has_the_same_numbers_whatever_ran_before():
    first = numbers(1, "noise", 77)
    torch.rand(10)
    numbers(1, "noise", 78)
    assert torch.equal(numbers(1, "noise", 77), first)


def test_numbers_are_pinned():
    # A change of these would silently give every resumed run other noise.
    assert generator(0, "noise", 0).initial_seed() == 261594111
    assert generator(1, "time", 2**32 - 1).initial_seed() == 3353427033


def test_streams_and_seeds_and_positions_differ():
    streams = get_args(Stream)
    keys = {generator(s, stream, p).initial_seed() for s in range(8) for stream in streams for p in range(8)}
    assert len(keys) == 8 * len(streams) * 8
    # (seed, position) = (0, 1) and (1, 0), which sums of seeds would confuse.
    assert not torch.equal(numbers(0, "noise", 1), numbers(1, "noise", 0))


def test_adjacent_positions_are_uncorrelated_and_uniform():
    rows = torch.stack([numbers(5, "noise", p, 4) for p in range(20_000)]).double().numpy()
    for lag in (1, 2, 8):
        for column in range(4):
            assert abs(np.corrcoef(rows[:-lag, column], rows[lag:, column])[0, 1]) < 4.5 / np.sqrt(20_000)
    for column in range(4):
        assert stats.kstest(rows[:, column], "uniform").pvalue > 1e-3
    across = np.corrcoef(rows.T)[np.triu_indices(4, 1)]
    assert np.abs(across).max() < 4.5 / np.sqrt(20_000)


def test_streams_at_the_same_position_are_uncorrelated():
    a, b, c = (
        np.array([float(numbers(seed, stream, p, 1)) for p in range(10_000)])
        for seed, stream in ((0, "time"), (0, "noise"), (1, "time"))
    )
    assert max(abs(np.corrcoef(a, b)[0, 1]), abs(np.corrcoef(a, c)[0, 1])) < 4.5 / np.sqrt(10_000)


@pytest.mark.parametrize("position", [-1, 2**32])
def test_a_position_out_of_range_is_refused(position):
    with pytest.raises(ValueError, match=rf"^position must lie in \[0, 2\*\*32\), got {position}$"):
        generator(0, "noise", position)


def test_shards_of_all_steps_have_their_own_positions():
    positions = [shard_position(step, shard, 8) for step in range(100) for shard in range(8)]
    assert sorted(positions) == list(range(800))
