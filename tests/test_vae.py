import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from test_agreement import LIKELIHOODS
from torch import nn
from torch.distributions.constraints import Constraint

import pyro_vae as pv
from pyro_vae.distributions import Bernoulli

EVENT, K, N, S = (2, 3), 4, 5, 7


def event_of(name):
    return LIKELIHOODS[name].event or EVENT


def make(name="Bernoulli"):
    case = LIKELIHOODS[name]
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=case.make(K, event_of(name), hidden_features=(6,), **case.options),
        guide=pv.guides.DiagonalNormal(event_of(name), K, hidden_features=(8,)),
    )


def data(name="Bernoulli"):
    return LIKELIHOODS[name].data(torch.rand(N, *event_of(name)))


def pyros_svi(vae, estimator=None):
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), estimator or Trace_ELBO())


def parameters(vae):
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize(
    "estimator",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(num_particles=S, vectorize_particles=True, max_plate_nesting=1),
        TraceGraph_ELBO(num_particles=2),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_every_likelihood_trains_under_pyros_svi(name, estimator):
    vae, x = make(name), data(name)
    svi = pyros_svi(vae, estimator)
    torch.manual_seed(3)
    before = sum(svi.evaluate_loss(x) for _ in range(20))
    old = [p.detach().clone() for p in vae.parameters()]
    for _ in range(60):
        svi.step(x)
    assert sum(svi.evaluate_loss(x) for _ in range(20)) < before
    assert all((p != q).any() for p, q in zip(vae.parameters(), old, strict=True))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_gives_distributions_of_the_stated_shapes(name):
    vae, x, event = make(name), data(name), event_of(name)
    vae.check_data(x)
    q = vae.encode(x)
    assert (q.batch_shape, q.event_shape) == ((N,), (K,))
    p = vae.decode(q.rsample((S,)))
    assert (p.batch_shape, p.event_shape) == ((S, N), event)
    assert p.log_prob(x).shape == (S, N)
    assert vae.reconstruct(x).shape == (N, *event)
    drawn = vae.sample(3)
    vae.check_data(drawn)
    assert drawn.shape == vae.sample(3, mean=True).shape == (3, *event)


def test_the_loss_is_the_negative_elbo_of_the_two_functions():
    vae, x = make("Normal").double(), data("Normal").double()
    q = vae.encode(x)
    torch.manual_seed(5)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(5)
    z = q.rsample()
    elbo = vae.decode(z).log_prob(x) + vae.prior().log_prob(z) - q.log_prob(z)
    assert loss == pytest.approx(-elbo.sum().item(), rel=1e-10)


def test_images_are_encoded_as_their_grey_levels():
    images = pv.data.from_array(np.random.default_rng(0).integers(0, 256, (N, 2, 3), dtype=np.uint8))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.ContinuousBernoulli(K, (1, 2, 3)),
        guide=pv.guides.DiagonalNormal((1, 2, 3), K),
    )
    assert torch.equal(vae.encode(images).mean, vae.encode(images[:]).mean)
    assert torch.equal(vae.reconstruct(images), vae.reconstruct(images[:]))
    vae.check_data(images)


def test_encoding_uses_no_random_numbers():
    vae, x = make(), data()
    before = torch.get_rng_state()
    vae.encode(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fixed_variance_is_exact_in_double_precision():
    p = make("Normal").double().decode(torch.zeros(N, K, dtype=torch.float64))
    torch.testing.assert_close(p.variance, torch.full_like(p.variance, 0.3), rtol=1e-15, atol=0)


def test_two_vaes_and_their_copies_train_independently():
    first, second = make(), make()
    x = data()
    svi = pyros_svi(first)
    svi.step(x)
    twin, pickled = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    models = [first, second, twin, pickled]
    start = [parameters(vae) for vae in models]
    assert torch.equal(start[0], start[2])
    assert torch.equal(start[0], start[3])
    for trained in models:
        others = [(vae, parameters(vae)) for vae in models if vae is not trained]
        old = parameters(trained)
        pyros_svi(trained).step(x)
        assert not torch.equal(parameters(trained), old)
        assert all(torch.equal(parameters(vae), kept) for vae, kept in others)
    assert len(pyro.get_param_store()) == 0


def test_frozen_parameters_are_unchanged():
    vae, x = make(), data()
    vae.likelihood.requires_grad_(False)
    frozen = parameters(vae.likelihood)
    svi = pyros_svi(vae)
    for _ in range(3):
        svi.step(x)
    assert torch.equal(parameters(vae.likelihood), frozen)


def test_double_precision_and_state_dict():
    vae = make("NegativeBinomial").double()
    assert vae.sample(2).dtype == torch.float64
    other = make("NegativeBinomial").double()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(parameters(vae), parameters(other))


def test_with_guide_shares_the_model_and_keeps_the_first_guide():
    vae, x = make(), data()

    def guide(batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(torch.zeros(len(batch), K), 0.5).to_event(1))

    swapped = vae.with_guide(guide)
    assert swapped.likelihood is vae.likelihood
    assert swapped.prior is vae.prior
    assert swapped.encode(x).mean.shape == (N, K)
    assert vae.encode(x).stddev[0, 0] != 0.5
    before = parameters(vae.likelihood)
    pyros_svi(swapped).step(x)
    assert not torch.equal(parameters(vae.likelihood), before)


class OwnGuide(nn.Module):
    """A user-defined guide module that samples its own site."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2 * K)

    def forward(self, x):
        loc, log_scale = self.linear(x.flatten(1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_a_user_defined_guide_module_trains_under_pyros_svi():
    vae, x = make().with_guide(OwnGuide()), data()
    old = vae.posterior.linear.bias.detach().clone()
    pyros_svi(vae, TraceMeanField_ELBO()).step(x)
    assert (vae.posterior.linear.bias != old).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_saved_vae_is_rebuilt_from_the_file_alone(name, tmp_path):
    vae = make(name).double()
    vae.save(tmp_path / "vae.pt")
    loaded = pv.VAE.load(tmp_path / "vae.pt")
    x = data(name).double()
    assert torch.equal(vae.reconstruct(x), loaded.reconstruct(x))
    z = torch.ones(N, K).double()
    assert torch.equal(vae.decode(z).log_prob(x), loaded.decode(z).log_prob(x))


def test_convolutional_networks_are_rebuilt_too(tmp_path):
    image = (1, 9, 10)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.DiscretizedLogistic(
            K, image, network=pv.networks.ConvDecoder(K, (2, 9, 10), channels=(4, 3))
        ),
        guide=pv.guides.DiagonalNormal(
            image, K, network=pv.networks.ConvEncoder(image, 2 * K, channels=(3, 4), activation="tanh")
        ),
    )
    vae.save(tmp_path / "vae.pt")
    x = torch.zeros(2, *image)
    assert torch.equal(pv.VAE.load(tmp_path / "vae.pt").reconstruct(x), vae.reconstruct(x))


def test_a_vae_with_a_user_defined_module_is_loaded_into_an_existing_one(tmp_path):
    vae = make().with_guide(OwnGuide())
    vae.save(tmp_path / "vae.pt")
    with pytest.raises(pv.CheckpointError, match=r"VAE.load\(path, into=vae\)"):
        pv.VAE.load(tmp_path / "vae.pt")
    other = make().with_guide(OwnGuide())
    assert pv.VAE.load(tmp_path / "vae.pt", into=other) is other
    assert torch.equal(parameters(other), parameters(vae))
    with pytest.raises(pv.CheckpointError, match="another architecture"):
        pv.VAE.load(tmp_path / "vae.pt", into=make())


def test_a_vae_with_a_replaced_part_is_not_saved_as_the_original(tmp_path):
    for replace in (
        lambda vae: vae.likelihood.network.__setitem__(2, nn.Tanh()),
        lambda vae: setattr(vae, "likelihood", pv.likelihoods.Bernoulli(K, EVENT, hidden_features=(6,))),
    ):
        vae = make()
        replace(vae)
        vae.save(tmp_path / "vae.pt")
        with pytest.raises(pv.CheckpointError, match=r"into=vae"):
            pv.VAE.load(tmp_path / "vae.pt")
    make("Normal").save(tmp_path / "vae.pt")
    with pytest.raises(pv.CheckpointError, match="parts or their settings differ"):
        pv.VAE.load(tmp_path / "vae.pt", into=make("Poisson"))


def test_numpy_arguments_and_an_empty_network_are_accepted(tmp_path):
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(np.int64(6)),
        likelihood=pv.likelihoods.Normal(6, (6,), variance=np.float64(0.5), network=nn.Sequential()),
        guide=make().posterior,
    )
    assert not list(vae.likelihood.parameters())
    simple = pv.likelihoods.Normal(K, EVENT, variance=np.float64(0.5))
    vae = pv.VAE(prior=pv.priors.StandardNormal(np.int64(K)), likelihood=simple, guide=make().posterior)
    vae.save(tmp_path / "vae.pt")
    assert pv.VAE.load(tmp_path / "vae.pt").likelihood.scale == simple.scale


@pytest.mark.parametrize(
    ("name", "spoil", "error", "message"),
    [
        ("Bernoulli", lambda x: x * 0.5, ValueError, r"x\[\d, \d, \d\] = 0.5 lies outside.*binarize="),
        ("Poisson", lambda x: -1 - x, ValueError, r"x\[0, 0, 0\] = -\d+ lies outside the support of Poisson"),
        (
            "Normal",
            lambda x: x.index_fill(0, torch.tensor([3]), float("nan")),
            ValueError,
            r"x\[3, 0, 0\] = nan",
        ),
        ("Normal", lambda x: x / 0, ValueError, "inf lies outside"),
        ("Normal", lambda x: x[:0], ValueError, "empty"),
        ("Normal", lambda x: x.flatten(1), ValueError, r"shape \(N, 2, 3\).*got \(5, 6\)"),
        ("Normal", lambda x: x.int(), TypeError, "floating point; got torch.int32"),
        ("Normal", lambda x: x[0], ValueError, r"got \(2, 3\): add a dimension for the batch, x\[None\]"),
        (
            "Normal",
            lambda x: x[:, :1],
            ValueError,
            r"got \(5, 1, 3\): reshape x, or build the VAE for its shape",
        ),
        ("Bernoulli", lambda x: (255 * x).byte(), TypeError, "torch.uint8: divide grey levels 0..255 by 255"),
        (
            "Bernoulli",
            lambda x: 255 * x,
            ValueError,
            r"= 255 lies.* 0 or 1; .*\. Divide grey levels 0..255 by 255",
        ),
        ("ContinuousBernoulli", lambda x: 255 * x, ValueError, "Divide grey levels 0..255 by 255$"),
        ("Bernoulli", lambda x: x - 1, ValueError, r"= -1 lies outside.*; \d+ of 30 values do$"),
        ("Poisson", lambda x: x + 0.5, ValueError, r"; 30 of 30 values do$"),
        ("Normal", lambda x: x.tolist(), TypeError, "must be a tensor; got list"),
    ],
)
def test_invalid_data_raise_with_name_and_index(name, spoil, error, message):
    with pytest.raises(error, match=message):
        make(name).check_data(spoil(data(name)))


class OwnLikelihood(nn.Module):
    """p(x|z) of a given family, with parameters (*, *event) that are a linear function of z."""

    def __init__(self, family, shape):
        super().__init__()
        self.network = nn.Linear(K, int(np.prod(shape)))
        self.family, self.shape = family, shape

    def forward(self, z):
        return self.family(self.network(z).unflatten(-1, self.shape))


def with_likelihood(family, shape, event=None):
    guide = pv.guides.DiagonalNormal(event or shape, K, hidden_features=(8,))
    return pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=OwnLikelihood(family, shape), guide=guide)


def test_one_hot_letters_are_evaluated_and_trained():
    """All letters are equally probable: log p(x|z) = −7 log 4."""
    vae = with_likelihood(lambda logits: dist.OneHotCategorical(logits=logits).to_event(1), (7, 4)).double()
    for parameter in vae.likelihood.parameters():
        nn.init.zeros_(parameter)
    x = nn.functional.one_hot(torch.randint(0, 4, (30, 7)), 4).double()
    found = pv.evaluate(vae, x, num_particles=5, progress=False)
    torch.testing.assert_close(
        found.per_datum.expected_log_likelihood,
        torch.full((30,), -7 * np.log(4), dtype=torch.float64),
        rtol=1e-10,
        atol=0,
    )
    pv.fit(vae, x, epochs=1, batch_size=15, progress=False)


EVENT_SUPPORTS = {  # family, shape of its parameters, data (5, *event), a wrong datum
    "one-hot": (
        lambda logits: dist.OneHotCategorical(logits=logits),
        (5,),
        lambda: torch.eye(5),
        torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]),
    ),
    "multinomial": (
        lambda logits: dist.Multinomial(6, logits=logits),
        (5,),
        lambda: dist.Multinomial(6, torch.ones(5)).sample((5,)),
        torch.tensor([4.0, 3.0, 0.0, 0.0, 0.0]),
    ),
    "simplex": (
        lambda raw: dist.Dirichlet(raw.exp()),
        (5,),
        lambda: dist.Dirichlet(torch.ones(5)).sample((5,)),
        torch.tensor([0.5, 0.6, 0.0, 0.0, 0.0]),
    ),
    "lower Cholesky": (
        lambda raw: dist.LKJCholesky(3, raw[..., 0].exp()),
        (1,),
        lambda: dist.LKJCholesky(3, 1.0).sample((5,)),
        torch.full((3, 3), 2.0),
    ),
    "positive definite": (
        lambda raw: dist.Wishart(raw[..., 0].exp() + 4, torch.eye(3)),
        (1,),
        lambda: torch.eye(3).expand(5, 3, 3),
        -torch.eye(3),
    ),
    "real vector": (
        lambda loc: dist.MultivariateNormal(loc, torch.eye(3)),
        (3,),
        lambda: torch.randn(5, 3),
        torch.tensor([0.0, float("inf"), 0.0]),
    ),
}


@pytest.mark.parametrize("name", EVENT_SUPPORTS)
def test_a_support_of_whole_events_is_checked_by_datum(name):
    family, shape, good, bad = EVENT_SUPPORTS[name]
    x = good().clone()
    vae = with_likelihood(family, shape, event=x.shape[1:])
    vae.check_data(x)
    x[3] = bad
    message = r"x\[3\] = \[.*\] lies outside the support of OwnLikelihood, .*; 1 of 5 events of shape \([35],"
    if name == "real vector":
        message = r"x\[3, 1\] = inf lies outside the support of OwnLikelihood, Real\(\); 1 of 15 values do"
    with pytest.raises(ValueError, match=message):
        vae.check_data(x)


class RealOrMissing(Constraint):
    def check(self, value):
        return torch.ones_like(value, dtype=torch.bool)


class NormalWithMissing(dist.Normal):
    """A normal whose values may be missing, NaN, and then have density 1; infinite values are censored."""

    support = RealOrMissing()

    def log_prob(self, value):
        missing = ~value.isfinite()
        return super().log_prob(value.where(~missing, 0)).where(~missing, 0)


def test_the_distribution_decides_whether_data_may_be_missing():
    vae = with_likelihood(lambda loc: NormalWithMissing(loc, 1.0).to_event(1), (3,)).with_guide(
        lambda x: dist.Normal(torch.zeros(len(x), K), 1.0).to_event(1)
    )
    x = torch.tensor([[0.0, float("nan"), 2.0], [float("inf"), 1.0, 0.0]])
    vae.check_data(x)
    assert pv.evaluate(vae, x, num_particles=3, progress=False).per_datum.elbo.isfinite().all()
    with pytest.raises(ValueError, match=r"x\[0, 1\] = nan lies outside"):
        with_likelihood(lambda loc: dist.Normal(loc, 1.0).to_event(1), (3,)).check_data(x)


class WithoutSupport(dist.Normal):
    @property
    def support(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "family",
    [
        lambda raw: dist.Uniform(0.0, raw.exp()).to_event(1),
        lambda raw: WithoutSupport(raw, 1.0).to_event(1),
        lambda raw: dist.Uniform(torch.zeros(3), torch.full((3,), 400.0)).expand(raw.shape).to_event(1),
    ],
    ids=["depends on z", "not stated", "bounds per element"],
)
def test_data_are_refused_only_where_no_z_allows_them(family):
    with_likelihood(family, (3,)).check_data(torch.full((2, 3), 300.0))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda x: x.flatten(1),
            ValueError,
            r"x must have .*\(\*, 2, 3\); got \(5, 6\): x.reshape\(-1, 2, 3\)",
        ),
        (lambda x: x.double(), TypeError, r"x is torch.float64, the parameters are torch.float32"),
        (lambda x: x.bool(), TypeError, "x must be floating point; got torch.bool"),
        (lambda x: x.to("meta"), ValueError, "x lies on meta, the parameters on cpu"),
        (lambda x: x[:0], ValueError, "empty"),
    ],
)
def test_a_batch_that_does_not_suit_the_networks_raises(spoil, error, message):
    vae = make()
    with pytest.raises(error, match=message):
        pyros_svi(vae).step(spoil(data()))


@pytest.mark.parametrize(
    ("name", "spoil", "fix"),
    [
        ("Bernoulli", lambda x: x * 0.5, "binarize="),
        ("Bernoulli", lambda x: x * 255, "Divide grey levels 0..255 by 255"),
        ("ContinuousBernoulli", lambda x: x * 255, "Divide grey levels 0..255 by 255"),
        ("DiscretizedLogistic", lambda x: x * 255, "Divide grey levels 0..255 by 255"),
    ],
)
def test_a_step_of_pyros_svi_reports_values_outside_the_support(name, spoil, fix):
    vae, x = make(name), spoil(data("Bernoulli"))
    with pytest.raises(
        ValueError, match=r"value\[\d, \d, \d\] = [\d.]+ lies outside the support of"
    ) as caught:
        pyros_svi(vae).step(x)
    sentence = str(caught.value).splitlines()[1]  # the first is Pyro's, and names the site
    assert fix in sentence
    assert "tensor(" not in str(caught.value)


@pytest.mark.parametrize("name", ["Bernoulli", "DiscretizedLogistic"])
def test_the_model_raises_for_bytes_whose_arithmetic_wraps(name):
    with pytest.raises(TypeError, match="x must be floating point; got torch.uint8"):
        make(name).model(data("Bernoulli").byte())


def test_a_value_of_another_shape_raises_torchs_error():
    p = Bernoulli(logits=torch.zeros(3))
    with pytest.raises(ValueError, match="not broadcastable"):
        p.log_prob(torch.zeros(5))


def test_wrong_networks_and_arguments_raise():
    with pytest.raises(
        ValueError, match=r"the network must return shape \(5, 8\).*got \(5, 7\): .* 8 outputs"
    ):
        pv.guides.DiagonalNormal(EVENT, K, network=nn.Sequential(nn.Flatten(), nn.Linear(6, 7)))(data())
    with pytest.raises(
        ValueError, match=r"must return 1 x \(2, 3\) numbers each; got \(5, 7\): .* 6 outputs"
    ):
        pv.likelihoods.Bernoulli(K, EVENT, network=nn.Linear(K, 7))(torch.zeros(N, K))
    with pytest.raises(ValueError, match=r"z must have shape \(\*, 4\); got \(5, 3\)"):
        make().decode(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"variance must be a positive number.*got -1"):
        pv.likelihoods.Normal(K, EVENT, variance=-1)
    with pytest.raises(ValueError, match="latent_dim must be at least 1; got 0"):
        pv.priors.StandardNormal(0)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        make().sample(0)
    with pytest.raises(TypeError, match="the likelihood must return a Pyro distribution; got Tensor"):
        pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=nn.Linear(K, 6), guide=make().posterior).model(
            data()
        )


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"prior": dist.Normal(0.0, 1.0)}, TypeError, "prior must be a module that returns a distribution"),
        ({"likelihood": pv.likelihoods.Normal}, TypeError, "got the class Normal itself: build one"),
        ({"guide": None}, TypeError, "guide must be .*; got None"),
        (
            {"prior": pv.priors.StandardNormal(5)},
            ValueError,
            "prior has 5 latent dimensions, the likelihood .* 3",
        ),
    ],
    ids=["a distribution", "a class", "None", "sizes"],
)
def test_parts_of_the_wrong_kind_raise(parts, error, message):
    fitting = {
        "prior": pv.priors.StandardNormal(3),
        "likelihood": pv.likelihoods.Normal(3, (4,)),
        "guide": pv.guides.DiagonalNormal((4,), 3),
    }
    with pytest.raises(error, match=message):
        pv.VAE(**fitting | parts)
