import pytest
import torch
from torch import nn

from pyro_vae import networks


@pytest.mark.parametrize("size", [(28, 28), (7, 9), (4, 5), (33, 17)])
def test_convolutional_trunks_keep_the_size_of_any_picture(size):
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
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
