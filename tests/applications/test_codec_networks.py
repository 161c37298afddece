"""Networks and tables in exact arithmetic: near the floating-point ones, and the same for any batch size."""

import hashlib

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.applications.codec import fixed_point as fp
from pyro_vae.applications.codec.errors import UnsupportedModelError
from pyro_vae.applications.codec.exact_networks import UNIT, ExactNetwork, convert, require_safe
from pyro_vae.applications.codec.integer_probabilities import (
    TOTAL,
    BernoulliTables,
    BetaBinomialTables,
    CountTables,
    Lattice,
    LogisticTables,
    positive_scale,
)
from pyro_vae.applications.codec.model import CodecModel
from pyro_vae.distributions import BetaBinomial
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder

ACTIVATIONS = ("elu", "gelu", "leaky_relu", "relu", "silu", "softplus", "tanh")
NETWORKS = {
    **{
        name: (lambda name=name: MLP(5, 3, hidden_features=(7, 6), activation=name), (5,))
        for name in ACTIVATIONS
    },
    "encoder": (lambda: ConvEncoder((2, 9, 11), 5, channels=(3, 4)), (2, 9, 11)),
    "decoder": (lambda: ConvDecoder(3, (2, 9, 11), channels=(3, 4), activation="silu"), (3,)),
    "odd sizes": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, (3, 4), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
            nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(1, 2), bias=False),
        ),
        (2, 5, 4),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_networks_are_near_and_do_not_depend_on_the_batch(name):
    make, shape = NETWORKS[name]
    network = make().double()
    x = torch.randint(-9, 10, (13, *shape)).double()
    exact = convert(network, 9 * UNIT)
    whole = exact(x.numpy() * UNIT)
    assert np.abs(whole / UNIT - network(x).detach().numpy()).max() < 4e-3
    for size in (1, 2, 5):
        parts = [exact(part.numpy() * UNIT) for part in x.split(size)]
        assert (np.concatenate(parts) == whole).all()


def test_a_sum_is_exact_in_python_integers():
    network = MLP(6, 4, hidden_features=(5,)).double()
    exact = convert(network, 7 * UNIT)
    x = np.arange(-3, 3)[None] * UNIT
    hidden = [int(v) for v in x[0]]
    for index, layer in enumerate((exact.layers[1], exact.layers[3])):
        rows = [[int(w) for w in row] for row in layer.weight]
        sums = [
            sum(w * h for w, h in zip(row, hidden, strict=True)) + int(b)
            for row, b in zip(rows, layer.bias, strict=True)
        ]
        hidden = [(total + UNIT // 2) // UNIT for total in sums]
        hidden = [max(h, 0) for h in hidden] if index == 0 else hidden
    assert hidden == exact(x)[0].tolist()


def test_the_bound_holds_and_is_checked():
    network = MLP(6, 4, hidden_features=(5,), activation="softplus").double()
    exact = convert(network, 7 * UNIT)
    bound, values = 7 * UNIT, np.sign(exact.layers[1].weight) * 7 * UNIT
    for layer in exact.layers:
        bound, values = layer.bound(bound), layer(values)
        assert np.abs(values).max() <= bound
    with torch.no_grad():
        network[1].weight.fill_(1e5)
        network[3].weight.fill_(1e5)
    with pytest.raises(UnsupportedModelError, match=r"beyond the 2⁵³.*tanh"):
        convert(network, 7 * UNIT)
    assert require_safe(2**53 - 1, "x") == 2**53 - 1


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()),
        nn.Sequential(nn.ELU(alpha=2.0)),
        nn.Sequential(nn.GELU(approximate="tanh")),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding_mode="circular", padding=1),
        nn.ConvTranspose2d(2, 2, 3, padding=3),
        nn.BatchNorm1d(3),
    ],
    ids=lambda network: type(network).__name__ + str(sum(map(len, map(str, network.children())))),
)
def test_other_layers_are_refused(network):
    with pytest.raises(UnsupportedModelError, match="has no exact form"):
        convert(network, UNIT)


def test_weights_that_are_not_finite_are_refused():
    network = nn.Linear(3, 2)
    with torch.no_grad():
        network.weight[1, 2] = torch.nan
    with pytest.raises(UnsupportedModelError, match="not finite"):
        convert(nn.Sequential(network), UNIT)


def test_a_network_survives_plain_values():
    exact = convert(NETWORKS["odd sizes"][0](), 9 * UNIT)
    again = ExactNetwork.from_plain(exact.to_plain(), 9 * UNIT)
    x = np.random.default_rng(0).integers(-9, 10, (3, 2, 5, 4)) * UNIT
    assert (again(x) == exact(x)).all()


def test_fixed_point_functions_are_accurate():
    for t in (0, 1, 12345, fp.ONE, 7 * fp.ONE + 3, 30 * fp.ONE):
        value = np.array([t])
        assert fp.exp_negative(value)[0] / fp.ONE == pytest.approx(float(mpmath.exp(-t / fp.ONE)), abs=3e-9)
        assert fp.softplus(-value)[0] / fp.ONE == pytest.approx(
            float(mpmath.log1p(mpmath.exp(-t / fp.ONE))), abs=1e-8
        )
        assert fp.log(value + 1)[0] / fp.ONE == pytest.approx(float(mpmath.log((t + 1) / fp.ONE)), abs=1e-8)
    values = np.array([1, 2, 3, 1 << 10, fp.ONE - 1, fp.ONE, fp.ONE + 1, 3 << 40, (1 << 52) - 1, 1 << 52])
    assert np.abs(fp.log_by_table(values) - fp.log(values)).max() <= 16
    steps = fp.log_by_table(np.arange(fp.ONE, 2 * fp.ONE, 999_983))
    assert np.abs(steps / fp.ONE - np.log(np.arange(fp.ONE, 2 * fp.ONE, 999_983) / fp.ONE)).max() < 1e-8
    for t in (-7.3, -1.0, 0.0, 0.001, 2.5, 9.0):
        place = np.array([round(t * 2**20)])
        for table, function in ((fp.normal_cdf_table(), mpmath.ncdf), (fp.logistic_cdf_table(), _sigmoid)):
            assert fp.interpolate(table, place)[0] / fp.ONE == pytest.approx(
                float(function(place[0] / 2**20)), abs=1e-7
            )
    assert (np.diff(fp.normal_cdf_table()) >= 0).all()
    assert (np.diff(fp.logistic_cdf_table()) >= 0).all()


def _sigmoid(t):
    return 1 / (1 + mpmath.exp(-t))


@pytest.mark.parametrize("loc", [-40.0, -5.9, 0.013, 7.0])
@pytest.mark.parametrize("scale", [1e-6, 0.03, 0.7, 50.0])
def test_lattice_counts_are_the_normal_masses(loc, scale):
    lattice = Lattice(6, 6.0)
    excess = lattice.excess(np.array([round(loc * UNIT)]), np.array([max(1, round(scale * 2**20))]))[0]
    assert (excess >= 0).all()
    assert excess.sum() == TOTAL - 64
    edges = np.concatenate([[-np.inf], np.arange(1, 64) * 12 / 64 - 6, [np.inf]])
    law = torch.distributions.Normal(
        torch.tensor(round(loc * UNIT) / UNIT).double(), max(1, round(scale * 2**20)) / 2**20
    )
    mass = law.cdf(torch.tensor(edges)).diff().numpy()
    assert np.abs(excess / TOTAL - mass).max() < 1e-5


def _likelihood(name, **options):
    return getattr(pv.likelihoods, name)(2, (3,), hidden_features=(4,), **options).double()


@pytest.mark.parametrize(
    "name", ["Bernoulli", "DiscretizedLogistic", "BetaBinomial", "Poisson", "NegativeBinomial"]
)
def test_tables_are_the_likelihood(name):
    likelihood = _likelihood(name)
    if name == "NegativeBinomial":
        with torch.no_grad():
            likelihood.raw_dispersion.copy_(torch.tensor([-1.0, 0.5, 3.0]))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=likelihood,
        guide=pv.guides.DiagonalNormal((3,), 2, hidden_features=(5,)).double(),
    )
    levels = {"Bernoulli": 2, "DiscretizedLogistic": 256, "BetaBinomial": 256}.get(name, 60)
    tables = CodecModel.from_vae(vae, Lattice(8, 6.0), levels - 1).tables
    raw = (torch.tensor([[-6.0, -0.3, 2.0], [0.1, 1.0, 3.0]]).double() * UNIT).round() / UNIT
    raw = raw[:, None].repeat(1, tables.num_parameters, 1)
    likelihood.outputs = lambda z, y=None: raw.unbind(1)
    p = likelihood(torch.zeros(2, 2).double()).base_dist
    found = tables.of((raw * UNIT).round().long().numpy())
    if levels == 2:
        assert np.abs(found / TOTAL - 1 + p.probs.detach().numpy()).max() < 3e-7
        return
    values = torch.arange(levels).double() / (255 if name == "DiscretizedLogistic" else 1)
    mass = p.log_prob(values[:, None, None]).exp().detach().permute(1, 2, 0).numpy()
    assert (found.sum(-1) == TOTAL - levels).all()
    assert (found >= 0).all()
    assert np.abs(found / TOTAL - mass).max() < 1.2 * levels / TOTAL  # each symbol has one count more


TABLES = {
    "Bernoulli": (BernoulliTables(), "273709bfe1fd"),
    "DiscretizedLogistic": (LogisticTables(), "16f02ba5dc80"),
    "BetaBinomial": (BetaBinomialTables(256), "a9bea892f6fa"),
    "Poisson": (CountTables(60), "25a78b0ad644"),
    "NegativeBinomial": (CountTables(60, np.array([7, 1 << 20, 1 << 36])), "f012e5089c03"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_same_to_the_bit_for_ever(name):
    """Or files of earlier releases could not be read."""
    tables, expected = TABLES[name]
    raw = (np.arange(40 * tables.num_parameters * 3) * 7919 % 200_003 - 100_000).reshape(40, -1, 3)
    found = np.ascontiguousarray(tables.of(raw), "<i8").tobytes()
    assert hashlib.sha256(found).hexdigest()[:12] == expected


@pytest.mark.parametrize("n", [1, 7, 255, 1000])
@pytest.mark.parametrize("alpha", [-30.0, -3.0, 2.25, 60.0, 4e4])
@pytest.mark.parametrize("beta", [-5.0, 0.0, 500.0, 1e9])
def test_beta_binomial_tables_over_the_range_of_the_parameters(n, alpha, beta):
    raw = torch.tensor([alpha, beta]).double().reshape(1, 2, 1)
    found = BetaBinomialTables(n + 1).of((raw * UNIT).long().numpy())[0, 0]
    assert (found >= 0).all()
    assert found.sum() == TOTAL - n - 1
    a, b = (positive_scale(np.array([int(v * UNIT) + 2217]))[0] / 2**20 for v in (alpha, beta))
    a, b = (torch.tensor(min(v, 2.0**20)).double() for v in (a, b))
    mass = BetaBinomial(a, b, total_count=n).log_prob(torch.arange(n + 1).double()).exp().numpy()
    assert np.abs(found / TOTAL - mass).max() < 1.2 * (n + 1) / TOTAL


def test_every_family_has_a_largest_value_for_the_guide():
    assert BernoulliTables().largest_value() == UNIT
    assert LogisticTables().largest_value() == UNIT
    assert LogisticTables().values(np.array([0, 255])).tolist() == [0, UNIT]
    assert CountTables(10).largest_value() == 9 * UNIT
    assert BetaBinomialTables(256).largest_value() == 255


def test_small_weights_for_large_counts_are_held():
    """A network of x/255 has first weights below 2⁻¹² once the division is in them."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.BetaBinomial(2, (1, 9, 7)),
        guide=pv.guides.DiagonalNormal((1, 9, 7), 2, network=ConvEncoder((1, 9, 7), 4, channels=(3,))),
    ).double()
    first = next(part for part in vae.posterior.network.modules() if isinstance(part, nn.Conv2d))
    with torch.no_grad():
        first.weight.div_(255)
    x = torch.randint(0, 256, (5, 1, 9, 7))
    loc, _ = CodecModel.from_vae(vae, Lattice(8, 6.0), 255).posterior(x.flatten(1).numpy())
    expected = vae.encode(x.double()).base_dist.loc.detach().numpy()
    assert np.abs(loc / UNIT - expected).max() < 2e-3
    with pytest.raises(UnsupportedModelError, match=r"must begin with a linear.*float64"):
        convert(nn.Sequential(nn.Tanh(), nn.Linear(3, 2)), 255, input_unit=1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"guide": pv.guides.FullCovarianceNormal((3,), 2)}, "the guide must be guides.DiagonalNormal"),
        ({"prior": pv.priors.Mixture(2)}, "the prior must be priors.StandardNormal"),
        ({"likelihood": pv.likelihoods.Normal(2, (3,))}, "the likelihood must be .* a?probability"),
    ],
    ids=["guide", "prior", "likelihood"],
)
def test_other_parts_are_refused(parts, message):
    own = {
        "prior": pv.priors.StandardNormal(2),
        "likelihood": pv.likelihoods.Bernoulli(2, (3,)),
        "guide": pv.guides.DiagonalNormal((3,), 2),
    }
    with pytest.raises(UnsupportedModelError, match=message.replace(" a?probability", " probability")):
        pv.applications.Codec(pv.VAE(**own | parts))
