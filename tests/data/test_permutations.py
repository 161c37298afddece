"""Orders as functions of a position."""

import math

import pytest
import torch

from pyro_vae.data.permutations import hold_out_evenly, permutation, permutation_by_chunks


@pytest.mark.parametrize(
    ("size", "chunk", "mixed"), [(101, 7, 3), (100, 10, 4), (5, 7, 2), (23, 4, 50), (1, 1, 1)]
)
def test_an_order_by_chunks_has_each_row_once(size, chunk, mixed):
    orders = [permutation_by_chunks(size, seed, chunk=chunk, mixed=mixed) for seed in (3, 3, 4)]
    rows = [order(torch.arange(size)) for order in orders]
    assert rows[0].sort().values.tolist() == list(range(size))
    assert rows[0].equal(rows[1])
    assert size < 10 or not rows[0].equal(rows[2])
    assert orders[0](torch.tensor([size - 1, 0])).tolist() == [rows[0][-1], rows[0][0]]


def test_an_order_by_chunks_reads_few_of_them_at_a_time():
    rows = permutation_by_chunks(101, 3, chunk=7, mixed=3)(torch.arange(101))
    chunks = [set((part // 7).tolist()) for part in rows[:63].split(21)]
    assert [len(each) for each in chunks] == [3, 3, 3]
    assert len(set.union(*chunks)) == 9
    assert (rows[:21] // 7).tolist() != sorted((rows[:21] // 7).tolist())  # mixed, not one after another


@pytest.mark.parametrize("size", [2, 10, 37])
def test_rows_are_held_out_evenly(size):
    for count in range(1, size):
        kept, held_out = hold_out_evenly(size, count, seed=5)
        a, b = kept(torch.arange(size - count)), held_out(torch.arange(count))
        assert torch.cat([a, b]).sort().values.tolist() == list(range(size))
        assert a.diff().ge(1).all()
        assert b.diff().ge(1).all()


def test_each_row_is_held_out_as_often():
    seeds, size, count = 3000, 12, 3
    times = torch.zeros(size)
    for seed in range(seeds):
        times[hold_out_evenly(size, count, seed)[1](torch.arange(count))] += 1
    p = count / size
    assert ((times / seeds - p).abs() < 5 * math.sqrt(p * (1 - p) / seeds)).all()


def test_rows_of_a_billion_are_held_out_in_place():
    size, count = 10**9, 10**8 - 7
    kept, held_out = hold_out_evenly(size, count, seed=5)
    ends = kept(torch.tensor([0, size - count - 1])), held_out(torch.tensor([0, count - 1]))
    assert int(ends[0][0]) <= 1
    assert int(max(ends[0][1], ends[1][1])) == size - 1
    assert int(min(ends[0][0], ends[1][0])) == 0


def test_a_long_order_is_a_permutation_too():
    order = permutation(1003, 3, in_memory=0)
    assert order(torch.arange(1003)).sort().values.tolist() == list(range(1003))
