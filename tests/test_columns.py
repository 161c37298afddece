"""Tables of mixed columns: every family against scipy, in the units of the data, with and without holes."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.applications import AnomalyDetector, anomaly_scores, impute
from pyro_vae.likelihoods import Columns
from pyro_vae.networks import RAW_ONE, ColumnEncoder, positive
from pyro_vae.utils.columns import Column, ColumnValues, parse_columns
from pyro_vae.utils.elements import elementwise

K, N = 2, 7
COLUMNS = [
    ("categorical", 3),
    "normal",
    "poisson",
    ("ordinal", 4),
    "log-normal",
    ("categorical", 5),
    "binary",
    "student-t",
    "negative-binomial",
    "normal",
    ("ordinal", 2),
]
D = len(COLUMNS)
NAMES = [f"c{place}" for place in range(D)]
OFFSET = [0, 170.0, 0, 0, 1.5, 0, 0, -3.0, 0, 0.02, 0]
SCALE = [1, 9.0, 4.0, 1, 0.7, 1, 1, 0.3, 25.0, 0.001, 1]
OUTPUTS = 3 + 1 + 1 + 1 + 1 + 5 + 1 + 1 + 1 + 1 + 1


class Constant(nn.Module):
    """A decoder that ignores z: every example has the same p(x)."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, z):
        return self.outputs.expand(len(z), -1)


def likelihood(**options):
    torch.manual_seed(3)
    options = {"offset": OFFSET, "scale": SCALE, "names": NAMES, **options}
    p = Columns(K, COLUMNS, network=Constant(0.8 * torch.randn(OUTPUTS)), **options).double()
    for group in p.groups:
        for parameter in group.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return p


def make(p=None, **options):
    torch.manual_seed(1)
    network = ColumnEncoder(COLUMNS, 2 * K, offset=OFFSET, scale=SCALE, hidden_features=(6,))
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=Columns(K, COLUMNS, offset=OFFSET, scale=SCALE, hidden_features=(5,)) if p is None else p,
        guide=pv.guides.DiagonalNormal((D,), K, network=network, mask_input=True),
    ).double()


@torch.no_grad()
def references(p):
    """scipy's distribution of each column, from the outputs of the network, as they are documented."""
    raw = dict(zip([g.family for g in p.groups], p.outputs(torch.zeros(1, K).double()), strict=True))
    groups = {g.family: g for g in p.groups}
    seen = dict.fromkeys(groups, 0)
    found = []
    for place, entry in enumerate(COLUMNS):
        family, k = (entry, 1) if isinstance(entry, str) else entry
        at, g = seen[family], groups[family]
        seen[family] += k if family == "categorical" else 1
        own = raw[family][0, at : seen[family]].detach().numpy()
        number = seen[family] - 1
        scale, m = SCALE[place], OFFSET[place] + SCALE[place] * own[0]
        mean = SCALE[place] * float(positive(torch.tensor(own[0] + RAW_ONE)))
        if hasattr(g, "raw_scale"):
            s = scale * (float(positive(g.raw_scale[number])) + 0.01)
        if family == "normal":
            found.append(scipy.stats.norm(m, s))
        elif family == "log-normal":
            found.append(scipy.stats.lognorm(s, scale=np.exp(m)))
        elif family == "student-t":
            found.append(scipy.stats.t(float(positive(g.raw_df[number])) + 2, m, s))
        elif family == "poisson":
            found.append(scipy.stats.poisson(mean))
        elif family == "negative-binomial":
            r = float(positive(g.raw_dispersion[number]))
            found.append(scipy.stats.nbinom(r, r / (r + mean)))
        elif family == "binary":
            found.append(scipy.stats.bernoulli(scipy.special.expit(own[0])))
        elif family == "categorical":
            found.append(scipy.stats.rv_discrete(values=(range(k), scipy.special.softmax(own))))
        else:
            t = torch.cat([g.first, positive(g.raw_gaps)], 1).cumsum(1)[number, : k - 1].detach().numpy()
            up_to = np.append(scipy.special.expit(t - own[0]), 1.0)
            found.append(scipy.stats.rv_discrete(values=(range(k), np.diff(up_to, prepend=0.0))))
    return found


def values(count, seed=0):
    """Examples from scipy's distributions, float64 (count, D)."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(
        np.stack(
            [np.asarray(r.rvs(size=count, random_state=random), float) for r in references(likelihood())], 1
        )
    )


@pytest.mark.parametrize("place", range(D), ids=map(str, COLUMNS))
def test_densities_and_moments_are_those_of_scipy(place):
    p, x = likelihood(), values(40)
    reference = references(p)[place]
    single = elementwise(p(torch.zeros(1, K).double()))
    column = x[:, place].numpy()
    expected = (reference.logpmf if hasattr(reference, "pmf") else reference.logpdf)(column)
    found = single.log_prob(x)[:, place].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(single.mean[0, place].item(), reference.mean(), rtol=1e-10)
    np.testing.assert_allclose(single.variance[0, place].item(), reference.var(), rtol=1e-10)


def test_the_density_of_an_example_is_the_sum():
    p, x = likelihood(), values(N)
    joint = p(torch.zeros(N, K).double())
    torch.testing.assert_close(joint.log_prob(x), elementwise(joint).log_prob(x).sum(-1), rtol=0, atol=1e-12)
    particles = p(torch.zeros(3, N, K).double())
    assert particles.batch_shape == (3, N)
    assert torch.equal(particles.log_prob(x), joint.log_prob(x).expand(3, N))
    assert torch.equal(joint.expand((4, N)).log_prob(x), joint.log_prob(x).expand(4, N))


def test_densities_of_numbers_integrate_to_one_in_their_units():
    """By the trapezoidal rule, over x or log x: with the Jacobian of the standardisation."""
    p = likelihood()
    single = elementwise(p(torch.zeros(1, K).double()))
    for place, reference in enumerate(references(p)):
        if COLUMNS[place] not in ("normal", "log-normal"):  # the tails of Student's t are too long
            continue
        grid = torch.linspace(*reference.ppf([1e-12, 1 - 1e-12]), 20_001, dtype=torch.float64)
        if COLUMNS[place] == "log-normal":
            low, high = np.log(reference.ppf([1e-12, 1 - 1e-12]))
            grid = torch.linspace(low, high, 20_001, dtype=torch.float64).exp()
        x = values(1).expand(len(grid), D).clone()
        x[:, place] = grid
        density = single.log_prob(x)[:, place].exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-6)


def test_draws_have_the_frequencies_of_their_columns():
    p, count = likelihood(), 20_000
    torch.manual_seed(0)
    x = p(torch.zeros(count, K).double()).sample()
    assert x.dtype == torch.float64
    for place, reference in enumerate(references(p)):
        cut = reference.median() if COLUMNS[place] in ("normal", "log-normal", "student-t") else 1.0
        share, expected = float((x[:, place] <= cut).double().mean()), float(reference.cdf(cut))
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12, place


def test_the_order_of_columns_does_not_matter():
    x = values(N)
    shuffled = torch.randperm(D, generator=torch.Generator().manual_seed(0)).tolist()
    plain = Columns(K, COLUMNS, offset=OFFSET, scale=SCALE, network=Constant(torch.zeros(OUTPUTS))).double()
    other = Columns(
        K,
        [COLUMNS[j] for j in shuffled],
        offset=[OFFSET[j] for j in shuffled],
        scale=[SCALE[j] for j in shuffled],
        network=Constant(torch.zeros(OUTPUTS)),
    ).double()
    z = torch.zeros(N, K).double()
    assert torch.equal(
        elementwise(plain(z)).log_prob(x)[:, shuffled], elementwise(other(z)).log_prob(x[:, shuffled])
    )


def holes(x, seed=2):
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    missing[0] = True
    missing[1] = False
    return torch.where(missing, torch.nan, x), missing


def test_what_is_missing_has_no_density_and_no_influence():
    vae, x = make(), values(N)
    _, missing = holes(x)
    z = torch.randn(N, K).double()
    single = elementwise(vae.decode(z)).log_prob(x)
    expected = torch.where(missing, 0.0, single).sum(-1) + vae.prior().log_prob(z)
    for filler in (0.0, 1.0, -5.5):
        filled = torch.where(missing, filler, x)
        found = vae.log_joint(filled, z, observed=~missing)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        q = vae.encode(filled, observed=~missing)
        assert torch.equal(q.mean, vae.encode(x, observed=~missing).mean)
    loss = -vae.log_joint(torch.where(missing, 0.0, x), z, observed=~missing).sum()
    gradients = torch.autograd.grad(loss, list(vae.likelihood.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_imputation_without_dependence_is_the_mean_of_the_column():
    p = likelihood()
    x = values(N)
    given, missing = holes(x)
    found = impute(make(p), given, num_particles=20, num_draws=6, method="importance")
    mean = torch.tensor([float(r.mean()) for r in references(p)], dtype=torch.float64)
    std = torch.tensor([float(r.std()) for r in references(p)], dtype=torch.float64)
    torch.testing.assert_close(found.mean, torch.where(missing, mean, x), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.std, torch.where(missing, std, 0.0), rtol=1e-9, atol=0)
    assert torch.equal(found.draws[:, ~missing], x[~missing].expand(6, -1))
    assert ColumnValues(parse_columns(COLUMNS)).check(found.draws).all()


def test_imputation_is_the_posterior_by_quadrature():
    """One latent dimension: E[x_j|x_obs] and its spread on a grid of z, to five standard errors."""
    torch.manual_seed(4)
    columns, S = ["normal", "poisson", ("categorical", 3), ("ordinal", 4), "binary"], 4000
    network = nn.Linear(1, 1 + 1 + 3 + 1 + 1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=Columns(1, columns, offset=[2.0] + [0] * 4, scale=[3.0, 2, 1, 1, 1], network=network),
        guide=pv.guides.DiagonalNormal((5,), 1, mask_input=True, network=ColumnEncoder(columns, 2)),
    ).double()
    network.weight.data *= 2
    x = vae.sample(6)
    missing = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    missing[0], missing[1] = True, torch.tensor([True, False, True, False, False])
    found = impute(vae, torch.where(missing, torch.nan, x), num_particles=S, method="importance")
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None, None]
    log_joint = vae.log_joint(x, z.expand(-1, 6, -1), observed=~missing)
    weight = log_joint.softmax(0)[..., None]
    single = elementwise(vae.decode(z.expand(-1, 6, -1)))
    mean = (weight * single.mean).sum(0)
    std = ((weight * (single.variance + single.mean.square())).sum(0) - mean.square()).sqrt()
    error = 5 * std / found.effective_sample_size[:, None].sqrt()
    assert ((found.mean - mean).abs()[missing] < error[missing]).all()
    torch.testing.assert_close(found.std[missing], std[missing], rtol=0.1, atol=0)
    assert torch.equal(found.mean[~missing], x[~missing])


def test_anomaly_scores_are_explained_by_column():
    vae, x = make(), values(N)
    scores = anomaly_scores(vae, x, num_particles=9)
    by_column = AnomalyDetector(vae, num_particles=9).explain(x)
    assert by_column.shape == (N, D)
    np.testing.assert_allclose(by_column.sum(1).numpy(), scores.reconstruction.values, rtol=1e-10)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_training_with_holes_raises_the_bound(engine):
    given, _ = holes(values(60))
    vae = make()
    options = {"missing": "nan", "estimator": pv.IWAE(5), "batch_size": 20, "engine": engine}
    history = pv.fit(vae, given, epochs=8, progress=False, learning_rate=0.02, **options)
    assert history[-1].train_bound > history[0].train_bound + 1
    report = pv.evaluate(vae, given, missing="nan", num_particles=5, progress=False)
    assert report.log_evidence > history[0].train_bound


def test_single_precision_stays():
    vae = make().float()
    x = values(N).float()
    p = vae.decode(torch.zeros(N, K))
    assert p.log_prob(x).dtype == p.sample().dtype == vae.encode(x).mean.dtype == torch.float32


def test_a_saved_table_vae_loads_to_the_bit(tmp_path):
    for vae in (make(), make().float()):
        vae.save(tmp_path / "vae.pt")
        loaded = pv.VAE.load(tmp_path / "vae.pt")
        x = values(N).to(next(vae.parameters()).dtype)
        z = torch.zeros_like(x[:, :K])
        assert torch.equal(loaded.decode(z).log_prob(x), vae.decode(z).log_prob(x))
        assert torch.equal(loaded.encode(x).mean, vae.encode(x).mean)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 3.0, "a code 0 … 2, as column 'c0' is categorical"),
        (0, 0.5, "a code 0 … 2"),
        (2, -1.0, "a whole number ≥ 0, as column 'c2' is poisson"),
        (3, 4.0, "a code 0 … 3, as column 'c3' is ordinal"),
        (4, 0.0, "a positive number, as column 'c4' is log-normal"),
        (6, 2.0, "0 or 1, as column 'c6' is binary"),
        (7, np.inf, "a finite number, as column 'c7' is student-t"),
        (8, 1.5, "a whole number ≥ 0, as column 'c8' is negative-binomial"),
        (9, np.nan, r"a finite number, .*pass missing='nan'"),
    ],
)
def test_a_value_that_its_column_cannot_have_is_named(place, value, message):
    x = values(N)
    x[4, place] = value
    vae = make(likelihood())
    with pytest.raises(ValueError, match=rf"x\[4, {place}\] = .* of Columns, {message}"):
        pv.fit(vae, x, epochs=1, progress=False)
    if not np.isnan(value):
        with pytest.raises(ValueError, match=rf"\[4, {place}\].*{message}"):
            vae.decode(torch.zeros(N, K).double()).log_prob(x)


def test_only_bits_are_not_taken_for_grey_levels():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=Columns(K, ["binary", "binary"]),
        guide=pv.guides.DiagonalNormal((2,), K),
    )
    with pytest.raises(ValueError, match="0 or 1, as column '0' is binary; 2 of 4 values do$"):
        vae.check_data(torch.full((2, 2), 1.0) * torch.tensor([255.0, 1.0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"columns": "normal"}, TypeError, r"columns must be a list such as"),
        ({"columns": []}, ValueError, "columns is empty"),
        ({"columns": ["gaussian"]}, ValueError, r"columns\[0\] must be one of normal, .*; got 'gaussian'"),
        ({"columns": ["normal", "ordinal"]}, ValueError, r"columns\[1\] .* write \('ordinal', k\)"),
        ({"columns": [("normal", 2)]}, ValueError, "write 'normal'"),
        ({"columns": [("ordinal", 1)]}, ValueError, "at least 2"),
        ({"columns": [("categorical", 2.0)]}, TypeError, "must be an integer"),
        ({"columns": [3]}, TypeError, "the name of a family"),
        ({"offset": [1.0]}, ValueError, "offset must have 2 numbers, one per column"),
        ({"scale": [1.0, 0.0]}, ValueError, "scale must be finite, and positive"),
        ({"offset": [np.nan, 0.0]}, ValueError, "offset must be finite;"),
        ({"names": ["a"]}, ValueError, "names must have 2 entries"),
        ({"min_scale": 0}, ValueError, "min_scale must be a positive number"),
        ({"network": nn.Linear(K, 3)}, ValueError, "must return 2 numbers each; got .*: give .* 2 outputs"),
    ],
)
def test_invalid_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Columns(K, **{"columns": ["normal", "binary"], **arguments})(torch.zeros(N, K))


def test_the_features_of_a_guide():
    columns = ["normal", "log-normal", "poisson", "binary", ("ordinal", 5), ("categorical", 3)]
    encoder = ColumnEncoder(columns, 4, offset=[10, 2, 0, 0, 0, 0], scale=[2, 0.5, 3, 1, 1, 1]).double()
    x = torch.tensor([[12.0, np.exp(3), 7.0, 1.0, 1.0, 2.0]]).double()
    expected = torch.tensor([[1.0, 2.0, np.log(2), 1.0, -0.5, 0.0, 0.0, 1.0]]).double()
    everywhere = torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(encoder.features(x, everywhere), expected, rtol=0, atol=1e-6)
    assert (encoder.features(torch.zeros(1, 6).double(), ~everywhere) == 0).all()
    assert torch.equal(encoder(x), encoder(torch.cat([x, torch.ones_like(x)], 1)))
    assert not torch.equal(encoder(x), encoder(torch.cat([x, torch.zeros_like(x)], 1)))
    with pytest.raises(ValueError, match="takes 6 columns, or 12 numbers .* got 14: a context is not"):
        encoder(torch.zeros(1, 14).double())


def test_supports_know_whether_they_are_discrete():
    assert ColumnValues([Column("binary"), Column("ordinal", 3)]).is_discrete
    assert not ColumnValues([Column("binary"), Column("log-normal")]).is_discrete
