"""Minibatches of tensors and images: lengths, order, binarisation."""

import pytest
import torch

from pyro_vae.data.batches import Batches
from pyro_vae.data.images import from_array

GREY = torch.rand(13, 2, 3, generator=torch.Generator().manual_seed(0))


def together(batches, size=5):
    return torch.cat(list(batches.in_order(size)))


def test_a_threshold_is_at_one_half():
    grey = torch.tensor([[0.0, 0.49, 0.5, 1.0]])
    assert together(Batches(grey, binarize="threshold")).tolist() == [[0, 0, 1, 1]]


def test_fixed_bits_are_the_same_at_each_pass_and_dynamic_ones_of_an_epoch_are_not():
    fixed, dynamic = (Batches(GREY, binarize=mode, seed=3) for mode in ("fixed", "dynamic"))
    assert torch.equal(together(fixed), together(fixed))
    assert set(together(fixed).unique().tolist()) == {0.0, 1.0}
    epochs = [torch.cat(list(dynamic.epoch(number, batch_size=13))) for number in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0].sum(), epochs[2].sum())


@pytest.mark.parametrize("data", [GREY, from_array(GREY)], ids=["tensor", "images"])
def test_an_epoch_that_starts_later_goes_on_as_it_would_have(data):
    batches = Batches(data, binarize="dynamic", seed=3)
    whole = list(batches.epoch(4, batch_size=3))
    list(batches.in_order(2))  # draws in between change nothing
    rest = list(batches.epoch(4, batch_size=3, start=2))
    assert [len(batch) for batch in whole] == batches.lengths(3) == [3, 3, 3, 4]
    assert all(map(torch.equal, whole[2:], rest))


def test_each_example_comes_once_an_epoch():
    batches = Batches(torch.arange(13.0)[:, None], seed=3)
    orders = [torch.cat(list(batches.epoch(number, batch_size=4))).flatten() for number in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(13.0)) for order in orders)
    assert not torch.equal(*orders)
