"""Invalid arguments raise errors with the expected value, the value found, and a fix."""

import re

import numpy as np
import pytest
import torch

from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.utils.validation import to_shape

EVENT, K = (2, 3), 5

SWAPPED = "was given event_shape=5 and latent_dim=\\(2, 3\\): swap the two"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: likelihoods.Bernoulli(K, 6),
            r"event_shape must be a tuple of integers; got 6: write \(6,\)",
        ),
        (lambda: likelihoods.Normal(K, "23"), "event_shape must be a tuple of integers; got '23'"),
        (lambda: likelihoods.Poisson(K, None), "event_shape must be a tuple of integers; got None"),
        (lambda: likelihoods.NegativeBinomial(K, (2, 3.5)), r"event_shape\[1\] must be an integer; got 3.5"),
        (lambda: likelihoods.Normal(EVENT, K), r"^Normal\(latent_dim, event_shape\) " + SWAPPED),
        (lambda: guides.LowRankNormal(K, EVENT), r"^LowRankNormal\(event_shape, latent_dim\) " + SWAPPED),
        (lambda: guides.DiagonalNormal(EVENT, 5.0), "latent_dim must be an integer; got 5.0"),
        (lambda: guides.DiagonalNormal(EVENT, K, hidden_features=50), r"hidden_features .*: write \(50,\)"),
        (lambda: guides.Flow(EVENT, K, flow_features=64), r"flow_features .*: write \(64,\)"),
        (lambda: priors.StandardNormal(EVENT), r"latent_dim must be an integer; got \(2, 3\)"),
        (lambda: priors.Mixture(K, num_components=4.0), "num_components must be an integer; got 4.0"),
        (lambda: priors.VampPrior(K), r"VampPrior takes the guide of the VAE.*; got 5"),
        (
            lambda: priors.VampPrior(guides.DiagonalNormal(EVENT, K), event_shape=6),
            "event_shape .*got 6: write",
        ),
        (lambda: networks.MLP(EVENT, K), r"in_features must be an integer; got \(2, 3\)"),
        (lambda: networks.ConvEncoder(6, K), r"event_shape must be .*; got 6: write \(6,\)"),
        (lambda: networks.ConvEncoder((1, 4, 5), K, channels=7), r"channels must be .*; got 7: write \(7,\)"),
        (lambda: networks.ConvDecoder((1, 4, 5), K), "out_shape must be a tuple of integers; got 5"),
    ],
)
def test_invalid_sizes_and_shapes_raise(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.Bernoulli(-K, EVENT), "latent_dim must be at least 1; got -5"),
        (lambda: likelihoods.Bernoulli(K, (2, 0, 3)), r"event_shape\[1\] must be at least 1; got 0"),
        (lambda: guides.Mixture((2, -3), K), r"event_shape\[1\] must be at least 1; got -3"),
        (
            lambda: guides.Mixture(EVENT, K, hidden_features=(7, 0)),
            r"hidden_features\[1\] .*at least 1; got 0",
        ),
        (lambda: networks.ConvEncoder((1, 4, 5), 0), "out_features must be at least 1; got 0"),
    ],
)
def test_sizes_below_one_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_any_sequence_of_integers_is_a_shape():
    for shape in (list(EVENT), np.array(EVENT), torch.zeros(7, *EVENT).shape[1:]):
        guide = guides.DiagonalNormal(shape, np.int64(K), hidden_features=[4])
        assert guide.event_shape == EVENT
        assert guide(torch.zeros(7, *EVENT)).event_shape == (K,)


@pytest.mark.parametrize(
    ("found", "expected", "advice"),
    [
        ((50, 784), (1, 28, 28), r"x.reshape\(-1, 1, 28, 28\) has it"),
        ((50, 1, 28, 28), (784,), r"x.reshape\(-1, 784\) has it"),
        ((50, 28, 28), (1, 28, 28), r"x.reshape\(-1, 1, 28, 28\) has it"),
        ((50, 8, 8, 3), (3, 8, 8), r"move the channels, x.movedim\(-1, 1\).* or build the VAE"),
        ((50, 3, 16, 8), (3, 8, 16), "^build the VAE for its shape"),
        ((50, 3, 16, 16), (16, 16, 3), "^build the VAE for its shape"),
        ((50, 5), (6,), "^reshape x, or build the VAE"),
    ],
)
def test_advice_on_shapes_mixes_no_axes(found, expected, advice):
    assert re.search(advice, to_shape("x", found, expected, "the VAE"))
