import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn

import pyro_vae as pv

EVENT, K, N = (6,), 3, 5


def make():
    torch.manual_seed(7)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, EVENT, hidden_features=(4,), variance="shared"),
        guide=pv.guides.DiagonalNormal(EVENT, K, hidden_features=(8,)),
    ).double()


def make_svi(vae, loss=None, **options):
    optimizer = torch.optim.Adam(vae.parameters(), 0.01)
    return pv.SVI(vae.model, vae.guide, optimizer, loss or TraceMeanField_ELBO(), **options)


@pytest.mark.parametrize(
    "estimator",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceGraph_ELBO(),
    ],
    ids=lambda e: f"{type(e).__name__}-{e.num_particles}-{e.vectorize_particles}",
)
def test_pyros_svi_takes_the_same_steps_on_the_same_random_numbers(estimator):
    ours, theirs = make(), make()
    batches = torch.randn(4, N, *EVENT, dtype=torch.float64)
    losses = []
    for svi in (
        make_svi(ours, estimator),
        pyro.infer.SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), estimator),
    ):
        torch.manual_seed(11)
        losses.append([svi.step(batches[i % 4]) for i in range(20)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-10, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_evaluate_loss_is_the_estimators_and_changes_no_state():
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    svi = make_svi(vae)
    before = copy.deepcopy(vae.state_dict())
    torch.manual_seed(2)
    found = svi.evaluate_loss(x)
    torch.manual_seed(2)
    assert found == TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_clipping_applies_to_the_whole_gradient():
    x = 100 * torch.randn(N, *EVENT, dtype=torch.float64)
    gradients = []
    for clip_norm in (None, 0.5):
        vae = make()
        svi = pv.SVI(
            vae.model,
            vae.guide,
            torch.optim.SGD(vae.parameters(), 0.0),
            TraceMeanField_ELBO(),
            clip_norm=clip_norm,
        )
        torch.manual_seed(2)
        svi.step(x)
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters()]))
    free, clipped = gradients
    assert free.norm() > 100
    torch.testing.assert_close(clipped, free * 0.5 / free.norm(), rtol=1e-6, atol=0)


def test_any_pyro_pair_trains():
    weight = nn.Parameter(torch.tensor(0.0))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("latent", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("latent", dist.Normal(weight * x, 0.7))

    svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.02), TraceMeanField_ELBO())
    x = torch.randn(40)
    for _ in range(200):
        svi.step(x)
    assert weight.item() == pytest.approx(0.5, abs=0.1)  # the posterior mean is x / 2


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro warns before the error
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda vae: vae.likelihood.raw_scale.data.fill_(float("nan")),
            "parameter 'likelihood.raw_scale' is not",
        ),
        (
            lambda vae: next(vae.posterior.parameters()).data.fill_(float("inf")),
            "parameter 'posterior.network.1",
        ),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_loss_that_is_not_finite_stops_before_the_parameters(spoil, message, validate):
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    svi = make_svi(vae)
    svi.step(x)
    spoil(vae)
    before = copy.deepcopy(vae.state_dict())
    with pyro.validation_enabled(validate), pytest.raises(pv.NonFiniteError, match=message):
        svi.step(x)
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("validate", [True, False])
def test_a_network_that_overflows_is_named_by_site_and_example(validate):
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    x[3] = 1e200
    with (
        pyro.validation_enabled(validate),
        pytest.raises(pv.NonFiniteError, match=r"site '[xz]' has (value|log prob) .* at index \[3"),
    ):
        make_svi(vae).step(x)


# Checks before the first step


class Shuffled(nn.Module):
    """An encoder with state that a check could change: random numbers and running means."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, K))

    def forward(self, x):
        return dist.Normal(self.network(x), 0.5).to_event(1)


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("as_function", [False, True])
def test_the_check_has_no_side_effects_and_runs_once(as_function, engine):
    """Losses, parameters and buffers equal those of a run checked beforehand."""
    x, runs = torch.randn(N, *EVENT), []
    states = []
    for beforehand in (False, True):
        torch.manual_seed(7)
        guide = Shuffled()
        vae = make().float().with_guide((lambda x, guide=guide: guide(x)) if as_function else guide)

        def counted(x, guide=vae.guide):
            runs.append(len(x))
            return guide(x)

        parameters = [*vae.likelihood.parameters(), *guide.parameters()]
        svi = pv.SVI(vae.model, counted, torch.optim.Adam(parameters, 0.01), Trace_ELBO(), engine=engine)
        torch.manual_seed(11)
        if beforehand:
            kept = copy.deepcopy(guide.state_dict())
            svi.check(x)
            assert all(torch.equal(kept[name], value) for name, value in guide.state_dict().items())
        runs.clear()
        losses = [svi.step(x) for _ in range(3)]
        if engine == "eager":
            assert len(runs) == 3 + (
                0 if beforehand else 2
            )  # the check runs it for its sites and for the estimator
        states.append([*guide.state_dict().values(), torch.tensor(losses)])
    assert all(map(torch.equal, *states))


def test_a_guide_that_does_not_fit_raises_before_the_first_step():
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    vae.posterior = pv.guides.DiagonalNormal(EVENT, K + 1).double()
    before = copy.deepcopy(vae.state_dict())
    svi = make_svi(vae)
    for _ in range(2):  # a second attempt raises too
        with pytest.raises(
            pv.GuideError, match=r"'z' has .* event shape \(4,\), expected .* event shape \(3,\)"
        ):
            svi.step(x)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_a_guide_put_in_place_of_another_is_checked():
    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    svi = make_svi(vae)
    svi.step(x)
    svi.guide = lambda x: None
    with pytest.raises(pv.GuideError, match="the guide has no site 'z'"):
        svi.step(x)


def test_an_estimator_that_is_wrong_for_the_pair_raises():
    loc = torch.zeros(N, K, dtype=torch.float64, requires_grad=True)

    def score_function(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", NonreparameterizedNormal(loc, 1.0).to_event(1))

    vae, x = make(), torch.randn(N, *EVENT, dtype=torch.float64)
    for loss in (TraceMeanField_ELBO(), pv.KLWeighted(TraceMeanField_ELBO(), 0.5), pv.IWAE(2)):
        svi = pv.SVI(vae.model, score_function, torch.optim.Adam([loc]), loss)
        with pytest.raises(ValueError, match=r"is not valid for this model and guide: .*'z'.*not reparam"):
            svi.step(x)
    pv.SVI(vae.model, score_function, torch.optim.Adam([loc]), Trace_ELBO()).step(x)

    vae.posterior = pv.guides.Mixture(EVENT, K).double()
    free = pv.KLWeighted(Trace_ELBO(), lambda step: 0.1 * step, free_bits=0.1)
    with pytest.raises(ValueError, match=r"^KLWeighted\(.* is not valid for .*: free bits need the KL"):
        make_svi(vae, free).check(x)
    assert free.steps == 0


def test_a_guide_that_the_optimiser_does_not_hold_raises():
    encoder = nn.Linear(6, K).double()

    def hidden(x):
        return dist.Normal(encoder(x), 1.0).to_event(1)

    def stored(x):
        pyro.module("encoder", encoder)
        return hidden(x)

    x = torch.randn(N, *EVENT, dtype=torch.float64)
    with pyro.get_param_store().scope():
        for guide, message in [
            (hidden, r"of shape \(3, 6\) without a Pyro statement"),
            (stored, "'encoder\\$\\$\\$weight'"),
        ]:
            vae = make().with_guide(guide)
            with pytest.raises(ValueError, match=f"{message}.* the optimiser does not hold it"):
                make_svi(vae).step(x)
            everything = [*vae.parameters(), *encoder.parameters()]
            pv.SVI(vae.model, vae.guide, torch.optim.Adam(everything), Trace_ELBO()).step(x)
    encoder.requires_grad_(False)
    make_svi(make().with_guide(hidden), Trace_ELBO()).step(x)
    vae = make()  # the guide is not trained on purpose
    pv.SVI(vae.model, vae.guide, torch.optim.Adam(vae.likelihood.parameters()), Trace_ELBO()).step(x)


def test_sites_that_the_model_enumerates_need_no_guide():
    logits, loc = (torch.zeros(3, requires_grad=True) for _ in range(2))

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(z + loc[k], 1.0), obs=x)

    def guide(x, name="z"):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal(x, 1.0))

    x = torch.randn(N)
    enumerating = TraceEnum_ELBO(max_plate_nesting=1)
    pv.SVI(model, guide, torch.optim.Adam([logits, loc]), enumerating).step(x)
    for wrong, loss, message in [
        (guide, Trace_ELBO(), "the guide has no site 'k'"),
        (lambda x: guide(x, "zz"), enumerating, "rename 'zz' to 'z'"),
    ]:
        with pytest.raises(pv.GuideError, match=message):
            pv.SVI(model, wrong, torch.optim.Adam([logits, loc]), loss).step(x)


def test_wrong_arguments_raise():
    vae = make()
    adam = torch.optim.Adam(vae.parameters())
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer.*got Adam|got PyroOptim"):
        pv.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(TypeError, match="got Trace_ELBO itself: call it"):
        pv.SVI(vae.model, vae.guide, adam, Trace_ELBO)
    with pytest.raises(TypeError, match=r"such as Trace_ELBO.*got str"):
        pv.SVI(vae.model, vae.guide, adam, "elbo")
    with pytest.raises(ValueError, match="clip_norm must be positive; got 0"):
        pv.SVI(vae.model, vae.guide, adam, Trace_ELBO(), clip_norm=0)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_parameter_first_met_at_a_later_step_is_not_left_untrained(engine):
    x = torch.full((6,), 3.0)

    def model(x, y=None):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y=None):
        a = pyro.param("a", torch.tensor(0.0))
        if y is not None:
            a = a + pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(a, 1.0).expand([6]))

    with pyro.get_param_store().scope():
        guide(x)
        held = [parameter for _, parameter in pyro.get_param_store().named_parameters()]
        svi = pv.SVI(model, guide, torch.optim.SGD(held, 0.01), Trace_ELBO(), engine=engine)
        svi.step(x)
        for _ in range(2):  # nor after the error was ignored
            with pytest.raises(ValueError, match=r"does not hold 'b' \(of pyro.param.*add_param_group"):
                svi.step(x, y=x)
        store = pyro.get_param_store()
        svi.optimizer.add_param_group({"params": [dict(store.named_parameters())["b"]]})
        svi.step(x, y=x)
        assert store["b"] != 0


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_parameter_that_a_step_does_not_use_stays_where_it_is(engine):
    used, seldom = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.2))

    def model(x, *, labelled):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, *, labelled):
        pyro.sample("z", dist.Normal(used + seldom * labelled if labelled else used, 1.0))

    svi = pv.SVI(model, guide, torch.optim.Adam([used, seldom], 0.01), Trace_ELBO(), engine=engine)
    for step in range(6):
        before = seldom.item()
        svi.step(torch.linspace(1.0, 2.0, N), labelled=step % 2 == 0)
        assert (seldom.item() == before) == (step % 2 == 1)


def test_parameters_of_other_pairs_are_none_of_its_business():
    def pair(name):
        def model(x):
            with pyro.plate("data", 3):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        def guide(x):
            loc = pyro.param(name, torch.tensor(0.0))
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(loc, 1.0).expand([3]))

        return model, guide

    x = torch.ones(3)
    with pyro.get_param_store().scope():
        steps = []
        for name in ("one", "two"):
            model, guide = pair(name)
            guide(x)
            held = [dict(pyro.get_param_store().named_parameters())[name]]
            steps.append(pv.SVI(model, guide, torch.optim.SGD(held, 0.01), Trace_ELBO()).step)
            steps[0](x)
        steps[1](x)


def test_a_decaying_average_baseline_trains_as_in_pyro():
    """TraceGraph_ELBO keeps its average in Pyro's store, where no optimiser holds it."""
    y = torch.linspace(-1.0, 2.0, 9)

    def first_losses(make):
        w = torch.nn.Parameter(torch.tensor(0.1))

        def model(y):
            with pyro.plate("d", len(y)):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("y", dist.Normal(k, 1.0), obs=y)

        def guide(y):
            pyro.param("w", w)
            baseline = {"use_decaying_avg_baseline": True}
            with pyro.plate("d", len(y)):
                pyro.sample("k", dist.Bernoulli(logits=w * y), infer={"baseline": baseline})

        with pyro.get_param_store().scope():
            svi = make(model, guide, w)
            torch.manual_seed(1)
            return [svi.step(y) for _ in range(4)]

    upstream = first_losses(
        lambda m, g, w: pyro.infer.SVI(m, g, pyro.optim.Adam({"lr": 0.01}), TraceGraph_ELBO())
    )
    ours = first_losses(
        lambda m, g, w: pv.SVI(m, g, torch.optim.Adam([w], 0.01), TraceGraph_ELBO(), engine="eager")
    )
    assert ours == pytest.approx(upstream, rel=1e-6)
