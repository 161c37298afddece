import inspect

import pytest
import torch
from torch import nn

from pyro_vae import guides, likelihoods, networks


@pytest.mark.parametrize("size", [(28, 28), (7, 9), (4, 5), (33, 17)])
def test_convolutional_networks_keep_the_size_of_any_image(size):
    image = (3, *size)
    code = networks.ConvEncoder(image, 11, channels=(5, 6))(torch.zeros(2, *image))
    assert code.shape == (2, 11)
    assert networks.ConvDecoder(11, image, channels=(6, 5))(code).shape == (2, *image)


def test_a_batch_of_particles_goes_through_a_network_like_its_flat_rows():
    torch.manual_seed(1)
    network = networks.ConvEncoder((1, 8, 8), 3, channels=(2,)).double()
    x = torch.randn(4, 5, 1, 8, 8, dtype=torch.float64)
    together = networks.apply_batched(network, x, 3)
    one_by_one = torch.stack([network(part) for part in x])
    assert together.shape == (4, 5, 3)
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-10)


def test_positive_neither_overflows_nor_reaches_zero():
    raw = torch.tensor([-torch.finfo(torch.float32).max, -100.0, 0.0, 100.0, 1e30], requires_grad=True)
    out = networks.positive(raw)
    assert (out > 0).all()
    assert torch.isfinite(torch.log(out)).all()
    torch.log(out).sum().backward()
    assert torch.isfinite(raw.grad).all()


def test_activations_are_the_named_ones():
    assert isinstance(networks.MLP(3, 2, hidden_features=(4,), activation="tanh")[2], nn.Tanh)
    assert [type(layer) for layer in networks.MLP(3, 2, hidden_features=())] == [nn.Flatten, nn.Linear]


def public_classes(room):
    return [cls for cls in map(vars(room).get, room.__all__) if not inspect.isabstract(cls)]


CONDITIONALS = [
    *[(make, ((2, 4), 3)) for make in public_classes(guides) if make is not guides.SemiAmortised],
    *[(make, (3, (2, 4))) for make in public_classes(likelihoods) if make is not likelihoods.Columns],
    (likelihoods.Columns, (3, ["normal", "binary"])),
]


@pytest.mark.parametrize(("make", "sizes"), CONDITIONALS)
def test_every_guide_and_likelihood_takes_the_network_options(make, sizes):
    network = make(*sizes, hidden_features=(7, 5), activation="elu").network
    assert [layer.out_features for layer in list(network)[1:4:2]] == [7, 5]
    assert isinstance(network[2], nn.ELU)
    assert make(*sizes).network[1].out_features == 400
    assert make(*sizes, network=network).network is network
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden_features'"):
        make(*sizes, hiden_features=(7,))


def test_raw_one_is_mapped_to_one():
    raw = torch.tensor(networks.RAW_ONE, dtype=torch.float64)
    assert networks.positive(raw).item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: networks.MLP(3, 2, activation="rleu"), "activation must be one of .*relu.*got 'rleu'"),
        (lambda: networks.MLP(3, 0), "out_features must be at least 1; got 0"),
        (lambda: networks.ConvEncoder((784,), 2), r"\(channels, height, width\); got \(784,\)"),
        (lambda: networks.ConvEncoder((1, 3, 28), 2), "2 halvings need an image of at least 4 pixels"),
        (lambda: networks.ConvDecoder(2, (1, 8, 8), channels=()), "at least one"),
    ],
)
def test_wrong_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("make", [likelihoods.Bernoulli, likelihoods.Normal, likelihoods.DiscretizedLogistic])
def test_a_convolutional_likelihood_by_name(make, context_dim):
    image = (3, 9, 10)
    likelihood = make(4, image, network="conv", activation="tanh", context_dim=context_dim)
    y = (torch.zeros(5, context_dim),) if context_dim else ()
    assert likelihood(torch.zeros(2, 5, 4), *y).event_shape == image
    expected = networks.ConvDecoder(
        4 + context_dim, (likelihood.num_parameters * 3, 9, 10), activation="tanh"
    )
    assert str(likelihood.network) == str(expected)


@pytest.mark.parametrize("mask_input", [False, True])
def test_a_convolutional_guide_by_name(mask_input):
    image = (3, 9, 10)
    guide = guides.LowRankNormal(image, 4, rank=2, network="conv", mask_input=mask_input)
    assert guide(torch.zeros(5, *image)).event_shape == (4,)
    assert str(guide.network) == str(networks.ConvEncoder((6 if mask_input else 3, 9, 10), 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guides.DiagonalNormal((6,), 2, network="conv"), r"for images, .*got \(6,\)"),
        (lambda: likelihoods.Normal(2, (6,), network="conv"), r"for images, .*got \(6,\)"),
        (lambda: likelihoods.Normal(2, (1, 8, 8), network="cnn"), "must be a module, or \"conv\"; got 'cnn'"),
        (
            lambda: guides.DiagonalNormal((1, 8, 8), 2, network="conv", context_dim=3),
            "no input for a context: .* one vector of 67 numbers",
        ),
    ],
)
def test_a_network_that_cannot_be_chosen_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
