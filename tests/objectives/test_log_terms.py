"""Terms of pairs of many shapes compared with Pyro's traces, the mean-field condition, and errors."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.poutine.util import prune_subsample_sites
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.inference.guide_check import GuideError, check_guide, check_mean_field
from pyro_vae.inference.svi import SVI
from pyro_vae.objectives.estimators import IWAE, STL
from pyro_vae.objectives.log_terms import terms

S, N, D, K = 5, 4, 6, 2  # particles, examples, dimensions of an example, latent dimensions
X = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def data_plate(x):
    return pyro.plate("data", len(x), dim=-1)


class Flat:
    """One latent vector."""

    @staticmethod
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([*z.shape[:-1], D]).to_event(1), obs=x
            )

    @staticmethod
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


class Hierarchical:
    """Two latent vectors, the second drawn given the first, in the same order in model and guide."""

    @staticmethod
    def model(x):
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(zeros(K), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z2.unsqueeze(-1) * x, 1.0).to_event(1), obs=x)

    @staticmethod
    def guide(x):
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(x[:, :K], 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(z1.prod(-1), 0.5))


class BottomUp(Hierarchical):
    """The guide draws the two latent vectors in reverse order."""

    @staticmethod
    def guide(x):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(x[:, 0], 0.5))
            pyro.sample("z1", dist.Normal(z2.unsqueeze(-1) * x[:, :K], 0.5).to_event(1))


class Masked(Flat):
    """A mask on data, and another on latent vectors."""

    @staticmethod
    def model(x):
        with data_plate(x):
            with poutine.mask(mask=MASK):
                z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
            with poutine.mask(mask=~MASK):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    @staticmethod
    def guide(x):
        with data_plate(x), poutine.mask(mask=MASK):
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


MASK = torch.tensor([True, False, True, True])


class Nested:
    """Latent and observed sites in a second plate, left of the data plate."""

    max_plate_nesting = 2

    @staticmethod
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            with pyro.plate("pixels", D, dim=-2):
                u = pyro.sample("u", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(u, 1.0), obs=x.T)

    @staticmethod
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, 0], 0.5))
            with pyro.plate("pixels", D, dim=-2):
                pyro.sample("u", dist.Normal(x.T / 2, 0.5))


class DataLeft:
    """The data plate, left of the pixel plate, is found by the sites in it, not by its dimension."""

    max_plate_nesting = 2

    @staticmethod
    def model(x):
        with pyro.plate("images", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            with pyro.plate("pixels", D, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def guide(x):
        with pyro.plate("images", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 0.5))


class TwoPlates:
    """All sites in two plates: the rightmost is the data plate, the other is summed over."""

    max_plate_nesting = 2

    @staticmethod
    def model(x):
        with data_plate(x), pyro.plate("frames", D, dim=-2):
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    @staticmethod
    def guide(x):
        with data_plate(x), pyro.plate("frames", D, dim=-2):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5))


class Discrete:
    """A discrete and a continuous latent site."""

    @staticmethod
    def model(x):
        with data_plate(x):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)))
            z = pyro.sample("z", dist.Normal(k.double().unsqueeze(-1) + zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp().sum(-1)), obs=x[:, 0].abs().round())

    @staticmethod
    def guide(x):
        with data_plate(x):
            pyro.sample("k", dist.Categorical(logits=x[:, :3]))
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


class Auxiliary(Flat):
    """A guide with an auxiliary site and a factor; a model with deterministic sites and a factor."""

    @staticmethod
    def model(x):
        pyro.deterministic("size", torch.tensor(len(x)))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
            pyro.deterministic("note", 2 * z)
            pyro.factor("tilt", -z.square().sum(-1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    @staticmethod
    def guide(x):
        with data_plate(x):
            u = pyro.sample("u", dist.Normal(zeros(K), 1.0).to_event(1), infer={"is_auxiliary": True})
            density = zeros(()) - 0.3
            pyro.sample("z", dist.Delta(x[:, :K] + u, log_density=density, event_dim=1))
            pyro.factor("jacobian", zeros(()) + 0.1, has_rsample=True)


class Partial:
    """Missing data as latent sites."""

    @staticmethod
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0], obs_mask=MASK)

    @staticmethod
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, 0], 0.5))
            with poutine.mask(mask=~MASK):
                pyro.sample("x_unobserved", dist.Normal(x[:, 1], 0.5))


class Subsampled:
    """A batch of a larger data set, subsampled by the plate."""

    @staticmethod
    def model(x):
        with pyro.plate("data", 3 * len(x), subsample_size=len(x), dim=-1) as index:
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.repeat(3, 1)[index, 0])

    @staticmethod
    def guide(x):
        with pyro.plate("data", 3 * len(x), subsample_size=len(x), dim=-1) as index:
            pyro.sample("z", dist.Normal(x.repeat(3, 1)[index, 1], 0.5))


PAIRS = {
    pair.__name__: pair
    for pair in (
        Flat,
        Hierarchical,
        BottomUp,
        Masked,
        Nested,
        DataLeft,
        TwoPlates,
        Discrete,
        Auxiliary,
        Partial,
        Subsampled,
    )
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
each_size = pytest.mark.parametrize("num_particles", [1, S])


def of(pair, x=X, *, num_particles=S):
    nesting = getattr(pair, "max_plate_nesting", 1)
    return terms(pair.model, pair.guide, x, num_particles=num_particles, max_plate_nesting=nesting)


@each_size
@each_pair
def test_terms_are_those_of_pyros_trace(pair, num_particles):
    """Each term, summed over the data and scaled, equals that of Pyro's trace, per particle."""
    nesting = getattr(pair, "max_plate_nesting", 1)
    torch.manual_seed(11)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=nesting)
    ((model_trace, guide_trace),) = elbo._get_traces(pair.model, pair.guide, (X,), {})
    expected = {"log_likelihood": 0.0, "log_prior": 0.0, "log_guide": 0.0}
    for trace in (model_trace, guide_trace):
        for site in prune_subsample_sites(trace).nodes.values():
            if site["type"] == "sample":
                rows = site["log_prob"].reshape(num_particles, -1)
                observed = "log_likelihood" if site["is_observed"] else "log_prior"
                name = "log_guide" if trace is guide_trace else observed
                expected[name] = expected[name] + rows.sum(1)
    torch.manual_seed(11)
    found = of(pair, num_particles=num_particles)
    for name, total in expected.items():
        term = getattr(found, name)
        assert term.shape == (num_particles, N)
        torch.testing.assert_close(found.scale * term.sum(1), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS.values() if pair is not Subsampled])
def test_each_example_has_its_own_terms(pair):
    """Changing one example changes its column of the terms, and no other."""
    changed = X.clone()
    changed[2] += 0.5
    weights = []
    for x in (X, changed):
        torch.manual_seed(0)
        weights.append(of(pair, x).log_weight)
    differs = (weights[0] != weights[1]).any(0)
    assert differs.tolist() == [False, False, True, False]


@each_pair
def test_particles_are_independent_draws(pair):
    assert len(of(pair).log_weight.unique(dim=0)) == S


def test_scale():
    assert of(Flat).scale == 1.0
    assert of(Subsampled).scale == pytest.approx(3.0)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scaled = [poutine.scale(program, scale=weight) for program in (Flat.model, Flat.guide)]
    assert terms(*scaled, X, num_particles=S).scale.tolist() == weight.tolist()
    torch.manual_seed(0)
    inside = terms(*scaled, X).log_weight
    torch.manual_seed(0)
    assert torch.equal(inside, of(Flat, num_particles=1).log_weight)


def test_subsampling_in_another_bound_than_pyros():
    """The scale stays outside the logarithm, unlike in RenyiELBO."""
    torch.manual_seed(0)
    loss = IWAE(S).loss(Subsampled.model, Subsampled.guide, X)
    torch.manual_seed(0)
    log_weight = of(Subsampled).log_weight
    assert loss == pytest.approx(-3 * (log_weight.logsumexp(0) - math.log(S)).sum().item(), rel=1e-12)


def test_convolutional_networks_and_images():
    """A decoder is called with flattened (S, N, K), an encoder with the images, once."""
    images = torch.rand(N, 1, 8, 8)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Flatten(), nn.LazyLinear(2 * K))
    decoder = nn.Sequential(
        nn.Linear(K, 48), nn.Unflatten(1, (3, 4, 4)), nn.ConvTranspose2d(3, 1, 2, stride=2)
    )
    calls = []
    encoder.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            logits = decoder(z.reshape(-1, K)).reshape(*z.shape[:-1], 1, 8, 8)
            pyro.sample("x", dist.ContinuousBernoulli(logits=logits).to_event(3), obs=x)

    def guide(x):
        loc, scale = encoder(x).chunk(2, -1)
        with data_plate(x):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    found = terms(model, guide, images, num_particles=S)
    assert found.log_weight.shape == (S, N)
    assert found.kl.shape == (N,)
    assert calls == [(N, 1, 8, 8)]


def test_gradients_reach_a_prior_with_parameters():
    loc = torch.zeros(K, dtype=torch.float64, requires_grad=True)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    found = terms(model, Flat.guide, X, num_particles=S)
    torch.testing.assert_close(torch.autograd.grad(found.kl.sum(), loc)[0], -X[:, :K].sum(0))
    assert (torch.autograd.grad(found.log_prior.sum(), loc)[0] != 0).all()


# The KL in closed form --------------------------------------------------------------------------------------


def test_kl_of_one_site():
    q, p = dist.Normal(X[:, :K], 0.5).to_event(1), dist.Normal(zeros(K), 1.0).to_event(1).expand([N])
    for num_particles in (1, S):
        found = of(Flat, num_particles=num_particles)
        torch.testing.assert_close(found.kl, kl_divergence(q, p), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.elbo, found.log_likelihood - found.kl)


@each_size
@pytest.mark.parametrize("pair", [Flat, Hierarchical, Masked, Nested, DataLeft, Subsampled])
def test_kl_is_that_of_trace_mean_field_elbo(pair, num_particles):
    nesting = getattr(pair, "max_plate_nesting", 1)
    torch.manual_seed(3)
    pyros = TraceMeanField_ELBO(
        num_particles=num_particles, vectorize_particles=True, max_plate_nesting=nesting
    ).loss(pair.model, pair.guide, X)
    torch.manual_seed(3)
    found = of(pair, num_particles=num_particles)
    assert found.kl.shape == (N,)
    assert (-found.scale * found.elbo.mean(0)).sum().item() == pytest.approx(pyros, rel=1e-12)


@pytest.mark.parametrize("pair", [Flat, BottomUp], ids=["closed", "sampled"])
def test_the_weight_on_the_kl_enters_the_elbo_once(pair):
    found = of(pair)
    kl = found.log_guide - found.log_prior if pair is BottomUp else found.kl
    weighted = replace(found, kl_weight=0.3)
    torch.testing.assert_close(weighted.elbo, found.log_likelihood - 0.3 * kl, rtol=1e-12, atol=1e-12)


def test_kl_and_sampled_kl_have_one_mean():
    found = terms(Hierarchical.model, Hierarchical.guide, X, num_particles=100_000)
    sampled = found.log_guide - found.log_prior
    error = 5 * sampled.std(0) / math.sqrt(len(sampled))
    assert ((sampled.mean(0) - found.kl).abs() < error).all()


def pair_of(q, p):
    """A pair of one site with given distributions."""

    class Pair:
        @staticmethod
        def model(x):
            with data_plate(x):
                z = pyro.sample("z", p)
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

        @staticmethod
        def guide(x):
            with data_plate(x):
                pyro.sample("z", q)

    return Pair


def no_kl(model, guide):
    class Pair:
        pass

    Pair.model, Pair.guide = staticmethod(model), staticmethod(guide)
    return Pair


def masked_guide(x):
    with data_plate(x), poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


def delta_guide(log_density):
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Delta(x[:, :K], log_density=zeros(()) + log_density, event_dim=1))

    return guide


def scaled_pair(guide_scale, model_scale):
    """A pair whose latent sites are scaled."""

    def model(x):
        with data_plate(x):
            with poutine.scale(scale=model_scale):
                z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    return no_kl(model, poutine.scale(Flat.guide, scale=guide_scale))


def masked_pair(guide_mask, model_mask):
    """A pair whose distributions, not its sites, are masked."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1).mask(model_mask))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1).mask(guide_mask))

    return no_kl(model, guide)


NORMAL = dist.Normal(zeros(K), 1.0).to_event(1)
TRANSFORMED = dist.TransformedDistribution(NORMAL, [dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)])


@pytest.mark.parametrize(
    "pair",
    [
        BottomUp,
        Auxiliary,
        pair_of(dist.StudentT(zeros(K) + 5.0).to_event(1), NORMAL),
        pair_of(TRANSFORMED, NORMAL),
        no_kl(Flat.model, delta_guide(0.3)),
    ],
    ids=["other order", "auxiliary site", "StudentT", "transformed", "Delta with a density"],
)
def test_no_kl_if_none_is_valid(pair):
    found = of(pair)
    assert found.kl is None
    assert torch.equal(found.elbo, found.log_weight)


def test_kl_of_distributions_with_one_mask():
    torch.testing.assert_close(of(masked_pair(MASK, MASK)).kl, of(Flat).kl * MASK, rtol=1e-12, atol=0)


def test_kl_of_a_delta_is_that_of_its_only_draw():
    found = of(no_kl(Flat.model, delta_guide(0.0)))
    torch.testing.assert_close(found.log_likelihood - found.kl, found.log_weight, rtol=1e-12, atol=0)


# Masks ------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([1, 3, 2, 3])


def sequences(*, in_guide="site", in_model="site"):
    """Independent steps of padded sequences and their exact posterior, each with a kind of mask."""

    def draw(name, q, on, kind):
        if kind == "distribution":
            return pyro.sample(name, q.mask(on))
        with poutine.mask(mask=on if kind == "site" else True):
            return pyro.sample(name, q)

    def model(x):
        with data_plate(x):
            for step in range(3):
                on = step < LENGTHS
                z = draw(f"z{step}", dist.Normal(zeros(N), 1.0), on, in_model)
                with poutine.mask(mask=on):
                    pyro.sample(f"x{step}", dist.Normal(z, 1.0), obs=x[:, step])

    def guide(x):
        with data_plate(x):
            for step in range(3):
                q = dist.Normal(x[:, step] / 2, 0.5**0.5)
                draw(f"z{step}", q, step < LENGTHS, in_guide)

    return model, guide


@each_size
@pytest.mark.parametrize("in_guide", ["site", "distribution"])
def test_masked_steps_do_not_count(in_guide, num_particles):
    """The guide is exact: every weight is the density of the steps that count."""
    x = X[:, :3]
    found = terms(*sequences(in_guide=in_guide), x, num_particles=num_particles)
    exact = (dist.Normal(zeros(()), 2**0.5).log_prob(x) * (torch.arange(3) < LENGTHS[:, None])).sum(-1)
    torch.testing.assert_close(found.log_weight, exact.expand(num_particles, N), rtol=1e-10, atol=1e-10)


def partly_observed(*, mask):
    """Missing data as latent sites, and the exact posterior, which masks what is observed if `mask`."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0], obs_mask=MASK)

    def guide(x):
        with data_plate(x):
            variance = 1 - MASK.to(x.dtype) / 2
            z = pyro.sample("z", dist.Normal(torch.where(MASK, x[:, 0] / 2, 0.0), variance.sqrt()))
            with poutine.mask(mask=~MASK if mask else True):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    return model, guide


def test_missing_data_add_nothing_to_the_evidence():
    exact = dist.Normal(zeros(()), 2**0.5).log_prob(X[:, 0]) * MASK
    found = terms(*partly_observed(mask=True), X, num_particles=S).log_weight
    torch.testing.assert_close(found, exact.expand(S, N), rtol=1e-10, atol=1e-10)


def of_pair(pair):
    return pair.model, pair.guide


UNLIKE_MASKS = {
    "the model's alone": (
        sequences(in_guide=None),
        r"'z1' has no mask, the model's .* counts 3 of 4 values and is first False at index \[0\]",
    ),
    "the guide's alone": (
        sequences(in_model=None),
        r"'z1' has a mask that counts 3 of 4 values .* the model's has no mask",
    ),
    "what is observed": (partly_observed(mask=False), r"'x_unobserved' has no mask, the model's"),
    "other masks": (
        of_pair(masked_pair(MASK, ~MASK)),
        r"'z' has a mask that counts 3 of 4 .* at index \[1, 0\], the model's has a mask that counts 1 of 4",
    ),
    "a Delta with a density": (
        (poutine.mask(Flat.model, mask=MASK), delta_guide(0.3)),
        "'z' has no mask, the model's",
    ),
}


@pytest.mark.parametrize("name", UNLIKE_MASKS)
def test_masks_of_one_program_alone_raise(name):
    pair, message = UNLIKE_MASKS[name]
    match = f"the guide's site {message}.*put the same mask around both"
    with pytest.raises(ValueError, match=match):
        terms(*pair, X)
    with pytest.raises(GuideError, match=match):
        check_guide(*pair, X)
    with pytest.raises(ValueError, match="put the same mask around both"):
        IWAE(S).loss(*pair, X)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(GuideError, match=match):
        SVI(*pair, optimizer, Trace_ELBO()).step(X)


def through_auxiliary(*, mask):
    """A latent vector computed from an auxiliary draw, as in Pyro's automatic guides."""

    def guide(x):
        with data_plate(x):
            with poutine.mask(mask=MASK if mask else True):
                u = pyro.sample("u", dist.Normal(x[:, :K], 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("other", dist.Normal(zeros(N), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u, event_dim=1))

    return guide


def unrelated(x):
    with data_plate(x):
        pyro.sample("other", dist.Normal(zeros(N), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(x[:, :K], event_dim=1))


@pytest.mark.parametrize(
    "guide",
    [delta_guide(0.0), unrelated, through_auxiliary(mask=True)],
    ids=["a Delta", "an unrelated auxiliary site", "a masked auxiliary site"],
)
def test_a_delta_without_density_needs_no_mask(guide):
    """Its log density is 0, masked or not."""
    model = poutine.mask(Flat.model, mask=MASK)
    assert check_guide(model, guide, X).problems == ()
    terms(model, guide, X, num_particles=S)


def test_an_automatic_guide_of_a_masked_model_raises():
    """The entropy of its draws would count where their prior does not."""
    model = poutine.mask(Flat.model, mask=MASK)
    message = "'z', drawn through '{}', has no mask, .*automatic guides put none: write the guide"
    with pytest.raises(ValueError, match=message.format("u")):
        terms(model, through_auxiliary(mask=False), X)
    with pytest.raises(GuideError, match=message.format("z_unconstrained")):
        check_guide(model, AutoNormal(model), X)
    assert check_guide(model, AutoDelta(model), X).problems == ()


def test_scales_of_one_program_alone_raise():
    pair = of_pair(scaled_pair(1.0, 0.5))
    with pytest.raises(GuideError, match="'z' is scaled by 1.0, the model's by 0.5.*KLWeighted"):
        check_guide(*pair, X)
    for scale in (0.5, torch.tensor([1.0, 3.0, 1.0, 2.0])):
        assert check_guide(*of_pair(scaled_pair(scale, scale)), X).problems == ()
    assert check_guide(poutine.scale(Flat.model, scale=0.5), delta_guide(0.0), X).problems == ()


# The mean-field condition -----------------------------------------------------------------------------------


def independent(first, second):
    def guide(x):
        with data_plate(x):
            for name in (first, second):
                event_dim = 1 if name == "z1" else 0
                loc = x[:, :K] if event_dim else x[:, 0]
                pyro.sample(name, dist.Normal(loc, 0.5).to_event(event_dim))

    return guide


@pytest.mark.parametrize(
    "guide",
    [Hierarchical.guide, independent("z1", "z2"), independent("z2", "z1")],
    ids=["chain", "same", "other"],
)
def test_check_mean_field_accepts(guide):
    state = torch.get_rng_state()
    check_mean_field(Hierarchical.model, guide, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_check_mean_field_runs_once_if_the_orders_agree():
    """For two sites in the same order, the guide and the model run once each."""
    runs = []

    def counted(program):
        return lambda x: runs.append(program.__name__) or program(x)

    check_mean_field(counted(Hierarchical.model), counted(Hierarchical.guide), X)
    assert runs == ["guide", "model"]


def test_check_mean_field_raises_if_the_guide_reverses_a_dependency():
    with pytest.raises(ValueError, match=r"draws 'z2' given 'z1', but the guide draws 'z1' given 'z2'"):
        check_mean_field(BottomUp.model, BottomUp.guide, X)


def test_check_mean_field_follows_a_chain_of_dependencies():
    """The guide's z1 depends on z2 through an auxiliary site and a deterministic site."""

    def guide(x):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(x[:, 0], 0.5))
            u = pyro.sample("u", dist.Normal(z2, 1.0), infer={"is_auxiliary": True})
            v = pyro.deterministic("v", u.exp(), event_dim=0)
            pyro.sample("z1", dist.Normal(v.unsqueeze(-1) * x[:, :K], 0.5).to_event(1))

    with pytest.raises(ValueError, match=r"draws 'z2' given 'z1', but the guide draws 'z1' given 'z2'"):
        check_mean_field(Hierarchical.model, guide, X)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (no_kl(Flat.model, masked_guide), "at 'z', guide and model have different masks.*use Trace_ELBO"),
        (masked_pair(MASK, ~MASK), "guide and model have different masks"),
        (masked_pair(MASK, True), "guide and model have different masks"),
        (no_kl(Flat.model, delta_guide(0.3)), "the guide's Delta has a log_density"),
        (scaled_pair(1.0, 0.3), "at 'z', the guide is scaled by 1.0 and the model by 0.3.*use KLWeighted"),
        (scaled_pair(torch.tensor([1.0, 3.0, 1.0, 2.0]), 1.0), r"scaled by tensor\(\[1., 3., 1., 2.\]\)"),
    ],
    ids=[
        "sites' masks",
        "distributions' masks",
        "mask of one distribution",
        "Delta with a density",
        "scale of the model's alone",
        "scale of the guide's alone",
    ],
)
def test_check_mean_field_raises_for_an_invalid_kl(pair, reason):
    sampled, registered = (
        estimator(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(
            pair.model, pair.guide, X
        )
        for estimator in (Trace_ELBO, TraceMeanField_ELBO)
    )
    assert abs(sampled - registered) > 0.5  # tens of standard errors
    with pytest.raises(ValueError, match=reason):
        check_mean_field(pair.model, pair.guide, X)


@pytest.mark.parametrize(
    "pair",
    [
        masked_pair(MASK, MASK.clone()),
        scaled_pair(0.3, torch.tensor(0.3)),
        no_kl(poutine.mask(Flat.model, mask=MASK), masked_guide),
        no_kl(Flat.model, delta_guide(0.0)),
        no_kl(
            Flat.model,
            poutine.mask(pair_of(dist.StudentT(zeros(K) + 5.0).to_event(1), NORMAL).guide, mask=MASK),
        ),
    ],
    ids=["distributions' masks", "scales", "sites' masks", "Delta", "other masks, but no KL in closed form"],
)
def test_check_mean_field_accepts_a_valid_kl(pair):
    check_mean_field(pair.model, pair.guide, X)


def test_check_mean_field_raises_for_sites_that_are_not_reparameterised():
    with pytest.raises(ValueError, match=r"'k', a Categorical, is not reparameterised.*Trace_ELBO, VIMCO"):
        check_mean_field(Discrete.model, Discrete.guide, X)


# Errors -----------------------------------------------------------------------------------------------------


def no_plate_model(x):
    z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[0, 0])


def no_plate_guide(x):
    pyro.sample("z", dist.Normal(x[0, :K], 0.5).to_event(1))


def global_latent_model(x):
    w = pyro.sample("w", dist.Normal(zeros(()), 1.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w * z.sum(-1), 1.0), obs=x[:, 0])


def global_latent_guide(x):
    pyro.sample("w", dist.Normal(zeros(()), 1.0))
    Flat.guide(x)


def unobserved_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def nothing_observed_model(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))


def nothing_latent_model(x):
    with data_plate(x):
        pyro.sample("x", dist.Normal(zeros(()), 1.0), obs=x[:, 0])


def no_guide(x):
    pass


def guide_with_another_site(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))
        pyro.sample("extra", dist.Normal(zeros(()), 1.0))


def guide_with_the_data(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))
        pyro.sample("x", dist.Normal(zeros(D), 1.0).to_event(1))


def guide_without_plate(x):
    pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))


def guide_of_other_event_dim(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(x[:, 0], 0.5))


def grey_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
        logits = z.sum(-1, keepdim=True).expand(*z.shape[:-1], D)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def scaled_prior_model(x):
    with data_plate(x):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])


def unplated_dimension_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0).expand([D, *z.shape[:-1]]), obs=x.T)


@each_size
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (no_plate_model, no_plate_guide, r'no site lies in a plate.*pyro.plate\("data"'),
        (global_latent_model, global_latent_guide, "guide's site 'w' lies outside the data plate 'data'"),
        (Flat.model, guide_without_plate, "guide's site 'z' lies outside the data plate 'data'"),
        (unobserved_model, Flat.guide, "model observes nothing.*obs="),
        (nothing_observed_model, Flat.guide, "model observes nothing"),
        (nothing_latent_model, no_guide, "no latent site"),
        (Flat.model, no_guide, "guide has no site 'z', expected one of"),
        (Flat.model, guide_with_another_site, "guide draws 'extra', which the model does not"),
        (Flat.model, guide_with_the_data, "guide draws 'x', which the model observes"),
        (
            Flat.model,
            guide_of_other_event_dim,
            "event_dims disagree at site 'z'|site 'x' has 5 entries at dim -1",
        ),
        (grey_model, Flat.guide, "model's site 'x': x(.|\n)*support of Bernoulli, 0 or 1"),
        (scaled_prior_model, Flat.guide, "guide's site 'z' is scaled by 1.0 and the model's site 'z' by 0.5"),
        (
            unplated_dimension_model,
            Flat.guide,
            "model's site 'x' (cannot score its|observes a) value(.|\n)*to_event",
        ),
        (Nested.model, Nested.guide, "(max_plate_nesting=1 plates|max_plate_nesting=2)"),
    ],
)
def test_a_pair_that_does_not_fit_raises(model, guide, message, num_particles):
    with pytest.raises(ValueError, match=message):
        terms(model, guide, X, num_particles=num_particles)


@each_size
def test_an_empty_batch_raises(num_particles):
    with pytest.raises(ValueError, match="plate has size 0: the batch must hold at least one example"):
        terms(Flat.model, Flat.guide, X[:0], num_particles=num_particles)


@pytest.mark.parametrize("name", ["num_particles", "max_plate_nesting"])
def test_counts(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        terms(Flat.model, Flat.guide, X, **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer; got 2.0"):
        terms(Flat.model, Flat.guide, X, **{name: 2.0})


def test_errors_of_the_programs_are_not_changed():
    def model(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        terms(model, Flat.guide, X)


@pytest.mark.parametrize(
    "pair", [Flat, Hierarchical, BottomUp, Masked, Nested, DataLeft, Partial, Subsampled]
)
def test_log_score_uses_no_random_numbers(pair):
    """The score is computed at the same draws and the same subsample."""
    found = of(pair)
    state = torch.get_rng_state()
    torch.testing.assert_close(found.log_score, found.log_guide, rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@each_size
def test_path_gradients_are_scaled_per_particle_and_example_in_any_data_plate(num_particles):
    """The gradient of each draw is multiplied by its weight."""
    weight = 1 + torch.arange(num_particles * N, dtype=torch.float64).reshape(num_particles, N)
    for pair in (Flat, Nested, DataLeft):
        nesting = getattr(pair, "max_plate_nesting", 1)
        loc = X.clone().requires_grad_()
        gradients = []
        for scale in (False, True):
            torch.manual_seed(0)
            found = terms(pair.model, pair.guide, loc, num_particles=num_particles, max_plate_nesting=nesting)
            draws = {name: site["value"] for name, site in found.sites.guide.items()}
            if scale:
                found.scale_path_gradients(weight)
            gradients.append(torch.autograd.grad(found.log_prior.sum(), list(draws.values())))
        for plain, scaled, site in zip(*gradients, found.sites.guide.values(), strict=True):
            ratio = scaled / plain
            plates = {f.name: f.dim for f in site["cond_indep_stack"]}
            data_dim = plates.get("data", plates.get("images")) - site["fn"].event_dim
            by_example = ratio.movedim(data_dim, -1)
            by_example = by_example.reshape(num_particles, -1, N)
            torch.testing.assert_close(by_example, weight.unsqueeze(1).expand_as(by_example))


def test_a_guide_of_one_site_keeps_its_dropout_in_the_score():
    calls = []

    def guide(x):
        calls.append(len(x))
        with data_plate(x):
            loc = nn.functional.dropout(x[:, :K], 0.5, training=True)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    found = terms(Flat.model, guide, X, num_particles=S)
    torch.testing.assert_close(found.log_score, found.log_guide, rtol=1e-12, atol=0)
    assert calls == [N]


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0), torch.tensor([3.0])], ids=["float", "()", "(1,)"])
def test_a_scale_around_the_pair_may_be_a_number_or_a_tensor_that_holds_one(scale):
    model, guide = (poutine.scale(program, scale=scale) for program in (Flat.model, Flat.guide))
    torch.manual_seed(3)
    scaled = terms(model, guide, X, num_particles=S)
    torch.manual_seed(3)
    plain = terms(Flat.model, Flat.guide, X, num_particles=S)
    assert float(scaled.scale) == 3.0
    torch.testing.assert_close(scaled.log_weight, plain.log_weight, rtol=0, atol=1e-10)
    loss = -3 * plain.log_weight.mean(0).sum()
    torch.manual_seed(3)
    assert STL(S).loss(model, guide, X) == pytest.approx(float(loss), rel=1e-10)
