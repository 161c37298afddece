"""Agreement of Pyro's ELBO with the analytic loss, for every likelihood and guide of the package.

    uv run python tests/test_agreement.py

prints a table: case, library value, analytic value, and the relative differences of value and gradient. A new
likelihood or guide needs one line in `LIKELIHOODS` or `GUIDES`; a test fails without it.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vae import VAE, closed_form, guides, likelihoods, priors
from pyro_vae.networks import RAW_ONE, positive

PARTICLES, DATA, LATENT, EVENT = 2, 5, 3, (2, 4)


# Analytic densities and divergences, from the outputs of the networks


class LikelihoodCase(NamedTuple):
    make: Callable[..., nn.Module]
    data: Callable[[Tensor], Tensor]  # from uniform random numbers
    nll: Callable[..., Tensor]  # (likelihood, x (N, D), each of the network's outputs (N, D)) -> (N,)
    options: dict[str, Any] = {}  # noqa: RUF012
    event: tuple[int, ...] | None = None  # of a likelihood of columns; others take any


def binary(u: Tensor) -> Tensor:
    return (u > 0.5).to(u)


def grey(u: Tensor) -> Tensor:
    return (u * 255).round() / 255


def counts(u: Tensor) -> Tensor:
    return (u * 9).floor()


def real(u: Tensor) -> Tensor:
    return 3 * u - 1


def learned_normal_nll(p: nn.Module, x: Tensor, mean: Tensor) -> Tensor:
    return closed_form.gaussian_nll(x, mean, positive(p.raw_scale).flatten() ** 2)


def poisson_nll(p: nn.Module, x: Tensor, raw: Tensor) -> Tensor:
    rate = positive(raw)
    return (rate - x * rate.log() + (x + 1).lgamma()).sum(-1)


def negative_binomial_nll(p: nn.Module, x: Tensor, raw: Tensor) -> Tensor:
    m, r = positive(raw), positive(p.raw_dispersion).flatten()
    log_choices = (x + r).lgamma() - r.lgamma() - (x + 1).lgamma()
    return -(log_choices + r * (r / (r + m)).log() + x * (m / (r + m)).log()).sum(-1)


def beta_binomial_nll(p: nn.Module, x: Tensor, raw_alpha: Tensor, raw_beta: Tensor) -> Tensor:
    a, b = (positive(raw + math.log(math.expm1(1 - 1e-6))) for raw in (raw_alpha, raw_beta))
    n, y = torch.full_like(x, p.total_count), p.total_count - x
    log_choices = (n + 1).lgamma() - (x + 1).lgamma() - (y + 1).lgamma()
    log_beta = a.lgamma() + b.lgamma() - (a + b).lgamma()
    return -(log_choices + (x + a).lgamma() + (y + b).lgamma() - (n + a + b).lgamma() - log_beta).sum(-1)


def discretized_logistic_nll(p: nn.Module, x: Tensor, raw_loc: Tensor, raw_scale: Tensor) -> Tensor:
    loc, scale, half = raw_loc + 0.5, positive(raw_scale - 2), 1 / 510
    below = torch.where(x < half, 0.0, ((x - half - loc) / scale).sigmoid())
    up_to = torch.where(x > 1 - half, 1.0, ((x + half - loc) / scale).sigmoid())
    return -(up_to - below).log().sum(-1)


def student_t_nll(p: nn.Module, x: Tensor, loc: Tensor, raw_scale: Tensor, raw_df: Tensor) -> Tensor:
    df, scale = positive(raw_df) + 2, positive(raw_scale) + 1e-3
    log_normaliser = ((df + 1) / 2).lgamma() - (df / 2).lgamma() - (df * math.pi).log() / 2 - scale.log()
    return -(log_normaliser - (df + 1) / 2 * (1 + ((x - loc) / scale) ** 2 / df).log()).sum(-1)


COLUMNS = [
    "binary",
    ("ordinal", 4),
    "student-t",
    "log-normal",
    ("categorical", 3),
    "negative-binomial",
    "normal",
    "poisson",
]
OFFSET = torch.tensor([0.0, 0.0, -0.5, 0.2, 0.0, 0.0, 0.7, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 1.0, 1.5, 0.6, 1.0, 3.0, 2.0, 4.0], dtype=torch.float64)


def mixed(u: Tensor) -> Tensor:
    """Values of `COLUMNS` from uniform numbers (N, 8)."""
    makers = [binary, lambda u: (4 * u).floor(), real, lambda u: u + 0.1, lambda u: (3 * u).floor()]
    makers += [counts, real, counts]
    return torch.stack([make(column) for make, column in zip(makers, u.unbind(1), strict=True)], 1)


def columns_nll(p: nn.Module, x: Tensor, *by_family: Tensor) -> Tensor:
    """Each family by its formula, in the order of `utils.columns.FAMILIES`; one column of each."""
    groups = dict(zip([group.family for group in p.groups], p.groups, strict=True))
    normal, log_normal, student_t, poisson, negative, bits, categories, ordered = by_family

    def column(family: str) -> tuple[Tensor, Tensor, Tensor]:
        place = [entry if isinstance(entry, str) else entry[0] for entry in COLUMNS].index(family)
        return x[:, place, None], OFFSET[place], SCALE[place]

    def gaussian(family: str, raw: Tensor, *, log: bool) -> Tensor:
        x, offset, scale = column(family)
        s = scale * (positive(groups[family].raw_scale) + 0.01)
        nll = closed_form.gaussian_nll(x.log() if log else x, offset + scale * raw, s**2)
        return nll + x.log().sum(-1) if log else nll

    total = gaussian("normal", normal, log=False) + gaussian("log-normal", log_normal, log=True)
    x_t, offset, scale = column("student-t")
    df, s = positive(groups["student-t"].raw_df) + 2, scale * (positive(groups["student-t"].raw_scale) + 0.01)
    log_normaliser = ((df + 1) / 2).lgamma() - (df / 2).lgamma() - (df * math.pi).log() / 2 - s.log()
    distance = ((x_t - offset - scale * student_t) / s) ** 2
    total -= (log_normaliser - (df + 1) / 2 * (1 + distance / df).log()).sum(-1)
    x_c, _, scale = column("poisson")
    m = scale * positive(poisson + RAW_ONE)
    total += (m - x_c * m.log() + (x_c + 1).lgamma()).sum(-1)
    x_c, _, scale = column("negative-binomial")
    m, r = scale * positive(negative + RAW_ONE), positive(groups["negative-binomial"].raw_dispersion)
    total -= ((x_c + r).lgamma() - r.lgamma() - (x_c + 1).lgamma()).sum(-1)
    total -= (r * (r / (r + m)).log() + x_c * (m / (r + m)).log()).sum(-1)
    total += closed_form.bernoulli_nll(column("binary")[0], bits)
    total -= categories.log_softmax(-1).gather(-1, column("categorical")[0].long()).sum(-1)
    g = groups["ordinal"]
    thresholds = torch.cat([g.first, positive(g.raw_gaps)], 1).cumsum(1)
    up_to = torch.cat([(thresholds - ordered).sigmoid(), torch.ones_like(ordered)], 1)
    return total - up_to.diff(dim=1, prepend=torch.zeros_like(ordered)).log().gather(
        -1, column("ordinal")[0].long()
    ).sum(-1)


LIKELIHOODS = {
    "Columns": LikelihoodCase(
        lambda latent, event, **options: likelihoods.Columns(latent, COLUMNS, **options),
        mixed,
        columns_nll,
        {"offset": OFFSET.tolist(), "scale": SCALE.tolist()},
        (len(COLUMNS),),
    ),
    "Bernoulli": LikelihoodCase(
        likelihoods.Bernoulli, binary, lambda p, x, logits: closed_form.bernoulli_nll(x, logits)
    ),
    "ContinuousBernoulli": LikelihoodCase(
        likelihoods.ContinuousBernoulli,
        grey,
        lambda p, x, logits: closed_form.continuous_bernoulli_nll(x, logits),
    ),
    "Normal": LikelihoodCase(
        likelihoods.Normal,
        real,
        lambda p, x, mean: closed_form.gaussian_nll(x, mean, 0.3),
        {"variance": 0.3},
    ),
    "Normal, shared variance": LikelihoodCase(
        likelihoods.Normal, real, learned_normal_nll, {"variance": "shared"}
    ),
    "Normal, variance per element": LikelihoodCase(
        likelihoods.Normal, real, learned_normal_nll, {"variance": "per_element"}
    ),
    "DiscretizedLogistic": LikelihoodCase(likelihoods.DiscretizedLogistic, grey, discretized_logistic_nll),
    "BetaBinomial": LikelihoodCase(likelihoods.BetaBinomial, counts, beta_binomial_nll, {"total_count": 9}),
    "Poisson": LikelihoodCase(likelihoods.Poisson, counts, poisson_nll),
    "NegativeBinomial": LikelihoodCase(likelihoods.NegativeBinomial, counts, negative_binomial_nll),
    "StudentT": LikelihoodCase(likelihoods.StudentT, real, student_t_nll),
}


class Draw(NamedTuple):
    """A draw z (N, K) from q(z|x), its log q(z|x), (N,), and KL(q ‖ N(0, I)), (N,), or None if unknown."""

    z: Tensor
    log_q: Tensor
    kl: Tensor | None


def draw_diagonal(loc: Tensor, scale: Tensor) -> Draw:
    z = loc + scale * torch.randn_like(loc)
    return Draw(z, -closed_form.gaussian_nll(z, loc, scale**2), closed_form.standard_normal_kl(loc, scale))


def density_and_kl(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Draw:
    prior = torch.zeros_like(loc), torch.eye(LATENT, dtype=loc.dtype)
    q = closed_form.MultivariateNormal(loc, scale_tril)
    return Draw(z, q.log_prob(z), closed_form.multivariate_normal_kl(loc, scale_tril, *prior))


def diagonal_normal(vae: VAE, x: Tensor) -> Draw:
    loc, raw_scale = vae.posterior.outputs(x)
    return draw_diagonal(loc, positive(raw_scale))


def full_covariance_normal(vae: VAE, x: Tensor) -> Draw:
    loc, raw_diagonal, below = vae.posterior.outputs(x)
    scale_tril = positive(raw_diagonal).diag_embed()
    row, column = torch.tril_indices(LATENT, LATENT, offset=-1)
    scale_tril[:, row, column] = below
    return density_and_kl(
        loc + (scale_tril @ torch.randn_like(loc).unsqueeze(-1)).squeeze(-1), loc, scale_tril
    )


def low_rank_normal(vae: VAE, x: Tensor) -> Draw:
    loc, raw_scale, raw_factor = vae.posterior.outputs(x)
    V, scale = raw_factor.unflatten(-1, (LATENT, -1)), positive(raw_scale)
    along = (V @ torch.randn(*V.shape[:-2], V.shape[-1], 1, dtype=V.dtype)).squeeze(-1)
    z = loc + along + scale * torch.randn_like(loc)
    return density_and_kl(z, loc, torch.linalg.cholesky(V @ V.mT + (scale**2).diag_embed()))


def mixture(vae: VAE, x: Tensor) -> Draw:
    z = vae.posterior(x).rsample()
    weights, locs, scales = vae.posterior.outputs(x)
    loc, scale = (part.unflatten(-1, (-1, LATENT)) for part in (locs, positive(scales)))
    log_components = -closed_form.gaussian_nll(z.unsqueeze(-2), loc, scale**2)
    return Draw(z, (weights.log_softmax(-1) + log_components).logsumexp(-1), None)


def flow(vae: VAE, x: Tensor) -> Draw:
    q = vae.posterior(x)
    z = q.rsample()
    return Draw(z, q.log_prob(z), None)  # tests of flows check its density


def semi_amortised(vae: VAE, x: Tensor) -> Draw:
    q = vae.posterior(x, vae.log_joint)
    return draw_diagonal(q.mean, q.stddev)


class UserDefined(nn.Module):
    """A user-defined guide."""

    def __init__(self, event_shape, latent_dim, *, hidden_features=()):
        super().__init__()
        self.loc = nn.Linear(math.prod(event_shape), latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Normal(self.loc(x.flatten(1)), 0.5).to_event(1)


def user_defined(vae: VAE, x: Tensor) -> Draw:
    loc = vae.posterior.loc(x.flatten(1))
    return draw_diagonal(loc, torch.full_like(loc, 0.5))


def refined(event_shape: tuple[int, ...], latent_dim: int, **options: Any) -> nn.Module:
    return guides.SemiAmortised(guides.DiagonalNormal(event_shape, latent_dim, **options), num_steps=2)


GUIDES: dict[str, tuple[Callable[..., nn.Module], Callable[[VAE, Tensor], Draw]]] = {
    "DiagonalNormal": (guides.DiagonalNormal, diagonal_normal),
    "FullCovarianceNormal": (guides.FullCovarianceNormal, full_covariance_normal),
    "LowRankNormal": (guides.LowRankNormal, low_rank_normal),
    "Mixture": (guides.Mixture, mixture),
    "Flow, iaf": (partial(guides.Flow, flow="iaf"), flow),
    "Flow, maf": (partial(guides.Flow, flow="maf"), flow),
    "Flow, nsf": (partial(guides.Flow, flow="nsf"), flow),
    "SemiAmortised": (refined, semi_amortised),
    "user-defined": (UserDefined, user_defined),
}


# The comparison


class Row(NamedTuple):
    case: str
    library: float
    analytic: float
    value_difference: float
    gradient_difference: float


def build(likelihood: str, guide: str) -> tuple[VAE, Tensor]:
    case = LIKELIHOODS[likelihood]
    vae = VAE(
        prior=priors.StandardNormal(LATENT),
        likelihood=case.make(LATENT, EVENT, hidden_features=(7,), **case.options),
        guide=GUIDES[guide][0](case.event or EVENT, LATENT, hidden_features=(6,)),
    ).double()
    return vae, case.data(torch.rand(DATA, *(case.event or EVENT), dtype=torch.float64))


def analytic_loss(vae: VAE, x: Tensor, likelihood: str, guide: str, *, analytic_kl: bool) -> Tensor:
    """The analytic negative ELBO, summed over the batch, with noise drawn per particle in Pyro's order."""

    def one_particle() -> Tensor:
        z, log_q, kl = GUIDES[guide][1](vae, x)
        outputs = [output.flatten(1) for output in vae.likelihood.outputs(z)]
        nll = LIKELIHOODS[likelihood].nll(vae.likelihood, x.flatten(1), *outputs)
        if analytic_kl and kl is not None:
            return (nll + kl).sum()
        log_prior = -closed_form.gaussian_nll(z, torch.zeros_like(z), 1.0)
        return (nll - log_prior + log_q).sum()

    return torch.stack([one_particle() for _ in range(PARTICLES)]).mean()


def gradients(loss: Tensor, vae: VAE) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(vae.parameters())))


ESTIMATORS: dict[str, tuple[type[ELBO], bool]] = {
    "Trace_ELBO": (Trace_ELBO, False),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO, True),
}


def compare(likelihood: str, guide: str, estimator: str) -> Row:
    torch.manual_seed(0)
    vae, x = build(likelihood, guide)
    make, analytic_kl = ESTIMATORS[estimator]
    torch.manual_seed(1)
    library = make(num_particles=PARTICLES).differentiable_loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    analytic = analytic_loss(vae, x, likelihood, guide, analytic_kl=analytic_kl)
    gradient_difference = max(
        ((found - expected).norm() / expected.norm()).item()
        for found, expected in zip(gradients(library, vae), gradients(analytic, vae), strict=True)
    )
    return Row(
        f"{likelihood} · {guide} · {estimator}",
        library.item(),
        analytic.item(),
        abs(library.item() - analytic.item()) / abs(analytic.item()),
        gradient_difference,
    )


CASES = list(itertools.product(LIKELIHOODS, GUIDES, ESTIMATORS))


@pytest.mark.parametrize(("likelihood", "guide", "estimator"), CASES)
def test_library_and_analytic_loss_agree_on_the_same_noise(likelihood, guide, estimator):
    row = compare(likelihood, guide, estimator)
    assert row.value_difference < 1e-10
    assert row.gradient_difference < 1e-10


@pytest.mark.parametrize(
    ("module", "made"),
    [
        (likelihoods, [case.make(LATENT, EVENT) for case in LIKELIHOODS.values()]),
        (guides, [make(EVENT, LATENT) for make, _ in GUIDES.values()]),
    ],
)
def test_every_class_of_the_package_is_in_the_table(module, made):
    public = {getattr(module, name) for name in module.__all__}
    bases = {likelihoods.Likelihood, guides.Guide}
    assert public - bases <= {type(instance) for instance in made}


def test_the_usual_vae_loss_is_the_library_loss_without_its_constant():
    vae, x = build("Normal", "DiagonalNormal")
    torch.manual_seed(1)
    library = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    loc, raw_scale = vae.posterior.outputs(x)
    z = loc + positive(raw_scale) * torch.randn_like(loc)
    (x_hat,) = vae.likelihood.outputs(z)
    usual = closed_form.vae_loss(
        x.flatten(1), x_hat.flatten(1), loc, positive(raw_scale) ** 2, weight=1 / (2 * 0.3)
    )
    constant = DATA * math.prod(EVENT) / 2 * math.log(2 * math.pi * 0.3)
    assert (library - usual.sum()).item() == pytest.approx(constant, rel=1e-10)
    for one, other in zip(gradients(library, vae), gradients(usual.sum(), vae), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# Expectations, for models with an exact ELBO


def linear_vae(guide: type[guides.Guide], seed: int) -> tuple[VAE, Tensor]:
    """A VAE with a linear-Gaussian likelihood and random W, b, c and guide, and data drawn from it."""
    torch.manual_seed(seed)
    D = 4
    vae = VAE(
        prior=priors.StandardNormal(LATENT),
        likelihood=likelihoods.Normal(LATENT, (D,), network=nn.Linear(LATENT, D), variance="shared"),
        guide=guide((D,), LATENT, network=nn.Linear(D, sum(guide.sizes(LATENT)))),
    ).double()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.7)
    return vae, exact_model(vae).sample(DATA).detach()


def exact_model(vae: VAE) -> closed_form.LinearGaussian:
    linear = vae.likelihood.network
    return closed_form.LinearGaussian(linear.weight, linear.bias, positive(vae.likelihood.raw_scale) ** 2)


def exact_elbo(vae: VAE, x: Tensor) -> Tensor:
    q = vae.encode(x)
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else q.variance.diag_embed()
    return exact_model(vae).elbo(x, q.mean, covariance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("guide", [guides.DiagonalNormal, guides.FullCovarianceNormal, guides.LowRankNormal])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_right_in_expectation(estimator, guide, seed):
    vae, x = linear_vae(guide, seed)
    loss = ESTIMATORS[estimator][0]()
    exact = -exact_elbo(vae, x).sum()
    draws = []
    for _ in range(300):
        draw = loss.differentiable_loss(vae.model, vae.guide, x)
        draws.append(torch.cat([draw.detach().reshape(1), *(g.flatten() for g in gradients(draw, vae))]))
    expected = torch.cat([exact.detach().reshape(1), *(g.flatten() for g in gradients(exact, vae))])
    found = torch.stack(draws)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-10).all()
    assert error[0] < 0.05 * exact.abs()  # so that the check above is strict


def test_at_the_exact_posterior_every_draw_of_the_sampled_form_is_the_evidence():
    vae, x = linear_vae(guides.FullCovarianceNormal, seed=2)
    posterior = exact_model(vae).posterior(x)

    def exact_guide(x: Tensor) -> dist.Distribution:
        return dist.MultivariateNormal(posterior.loc, scale_tril=posterior.scale_tril)

    exact = vae.with_guide(exact_guide)
    loss = Trace_ELBO(num_particles=3).loss(exact.model, exact.guide, x)
    assert loss == pytest.approx(-exact_model(vae).log_evidence(x).sum().item(), rel=1e-10)


def main() -> None:
    """Print the table."""
    print(f"{'case':66} {'library':>14} {'analytic':>14} {'value':>9} {'gradient':>9}")
    rows = []
    for case in CASES:
        row = compare(*case)
        rows.append(row)
        differences = f"{row.value_difference:9.1e} {row.gradient_difference:9.1e}"
        print(f"{row.case:66} {row.library:14.8f} {row.analytic:14.8f} {differences}", flush=True)
    value, gradient = max(r.value_difference for r in rows), max(r.gradient_difference for r in rows)
    print(
        f"{len(rows)} cases; largest relative difference of a value {value:.1e}, of a gradient {gradient:.1e}"
    )


if __name__ == "__main__":
    main()
