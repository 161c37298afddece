"""A gradient that is not finite stops the step before any parameter moves, though the loss is finite."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.objectives.estimators import label

ENGINES = ["eager", "traced", pytest.param("compiled", marks=pytest.mark.slow)]


class Counts:
    """Counts with a size factor: the rate of a datum of zeros is 0, where its gradient is 0/0."""

    def __init__(self):
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.x = torch.poisson(torch.full((20, 6), 5.0))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            rate = x.sum(-1, keepdim=True) * self.decoder(z).softmax(-1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture(autouse=True)
def store():
    with pyro.get_param_store().scope():
        yield


def spoiled(x, index):
    x = x.clone()
    x[index] = 0
    return x


def test_the_first_step_names_parameter_site_and_datum():
    """The case as reported: loss 343.09, no error, and parameters that are no longer finite."""
    pair = Counts()
    x = spoiled(pair.x, 0)
    svi = pv.SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters), Trace_ELBO(), engine="eager")
    with pytest.raises(
        pv.NonFiniteError,
        match=r"^the loss is 343.087, but the gradient of parameter 'encoder\$\$\$weight' \(and of 3 more\) "
        r"is not finite: at site 'x', index 0 of plate 'data', the gradient with respect to rate of Poisson, "
        r"0 at \[0, 0\], is nan. Keep",
    ):
        svi.step(x)
    assert all(parameter.isfinite().all() and parameter.grad is None for parameter in pair.parameters)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip_norm", [None, 10.0])
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.Adam(p, 0.01), lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9)]
)
def test_parameters_and_optimizer_rest_and_training_goes_on(engine, clip_norm, optimizer, caplog):
    pair = Counts()
    svi = pv.SVI(
        pair.model,
        pair.guide,
        optimizer(pair.parameters),
        Trace_ELBO(max_plate_nesting=1),
        engine=engine,
        clip_norm=clip_norm,
    )
    losses = []
    for step in range(9):
        before = copy.deepcopy((pair.parameters, svi.optimizer.state_dict()))
        if step in (0, 3, 6):  # at the recording; at and between uses that are compared
            with pytest.raises(pv.NonFiniteError, match="gradient .* is not finite: at site 'x', index 3 of"):
                svi.step(spoiled(pair.x, 3))
            torch.testing.assert_close((pair.parameters, svi.optimizer.state_dict()), before, rtol=0, atol=0)
            assert all(parameter.grad is None for parameter in pair.parameters)
        else:
            losses.append(svi.step(pair.x))
    assert svi.steps == 6
    assert not [record for record in caplog.records if record.name == "pyro_vae"]
    pair = Counts()  # the same steps and random numbers without these batches
    reference = pv.SVI(
        pair.model,
        pair.guide,
        optimizer(pair.parameters),
        Trace_ELBO(max_plate_nesting=1),
        engine="eager",
        clip_norm=clip_norm,
    )
    expected = []
    for step in range(9):
        if step in (0, 3, 6):
            reference.evaluate_loss(pair.x)  # draws
        else:
            expected.append(reference.step(pair.x))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "estimator",
    [
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        TraceGraph_ELBO(),
        pv.IWAE(3),
        pv.STL(),
        pv.DReG(3),
        pv.VIMCO(3),
        pv.KLWeighted(Trace_ELBO(), lambda step: 0.1 * step),
    ],
    ids=label,
)
def test_every_estimator_names_the_datum(estimator):
    pair = Counts()
    svi = pv.SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters), estimator, engine="eager")
    with pytest.raises(
        pv.NonFiniteError,
        match="parameter 'encoder.*site 'x', .*index 3 of plate 'data', .* rate of Poisson, 0 at",
    ):
        svi.step(spoiled(pair.x, 3))
    assert getattr(estimator, "steps", 0) == 0  # a step that was not taken does not count


def step_of(branch, x, engine="eager"):
    weight = nn.Parameter(torch.tensor(0.3))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", branch(z, weight), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(weight * torch.ones(len(x)), 1.0))

    svi = pv.SVI(
        model, guide, torch.optim.SGD([weight], 1e-30), Trace_ELBO(max_plate_nesting=1), engine=engine
    )
    svi.step(x)
    return weight


class ZeroAtThird(torch.autograd.Function):
    """An operation with the value 0, whose gradient at the third datum is NaN."""

    @staticmethod
    def forward(ctx, z):
        return torch.zeros_like(z)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_fill(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            lambda z, w: dist.Normal(z + ZeroAtThird.apply(z), 1.0),
            "number 0 of the optimiser, .*site 'z', index 2 of plate 'rows', the gradient with respect to "
            "its draw, .* is nan",
        ),
        (
            lambda z, w: dist.Normal(z, 1.0 + torch.sqrt((w - w) ** 2)),
            "is not finite: those of all sites are, so look for an operation on the parameter, such as sqrt",
        ),
        (
            lambda z, w: dist.MaskedDistribution(dist.Normal(z, 1.0), torch.arange(5) != 4),
            "site 'x', index 4 of plate 'rows', .* to loc of Normal, .* An observed value",
        ),
    ],
    ids=["draw", "parameter alone", "masked NaN"],
)
def test_where_the_gradient_stops_being_finite(branch, message):
    x = torch.linspace(-1.0, 2.0, 5)
    if "observed" in message:
        x[4] = float("nan")
    with pyro.validation_enabled(False), pytest.raises(pv.NonFiniteError, match=message):
        step_of(branch, x)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_finite_gradients_whose_squares_overflow_are_taken(engine):
    weight = step_of(lambda z, w: dist.Normal(1e13 * w * torch.ones(5), 1.0), torch.zeros(5), engine)
    assert weight.grad.isfinite()
    assert weight.grad > 1e25


def test_sparse_gradients_are_checked():
    table = nn.Embedding(4, 2, sparse=True)

    def model(index, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(index, x):
        with pyro.plate("rows", len(x)):
            loc = table(index)
            pyro.sample("z", dist.Normal(loc, 1.0 + (loc - loc.detach()).abs().sqrt()).to_event(1))

    svi = pv.SVI(model, guide, torch.optim.SparseAdam(table.parameters()), Trace_ELBO(), engine="eager")
    with pytest.raises(pv.NonFiniteError, match="the gradient of parameter number 0"):
        svi.step(torch.tensor([1, 3, 1]), torch.ones(3, 2))
