"""A pair that draws other sites in guide and model with a later batch is refused, in every engine."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn

import pyro_vae as pv

N = 7
X, NONE = torch.linspace(-2, 2, N), torch.zeros(N)
ONE = NONE.index_fill(0, torch.tensor(3), 1.0)
ESTIMATORS = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=2),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    pv.IWAE(2),
    pv.KLWeighted(Trace_ELBO(), lambda step: 0.5),
]


def pair(*late, infer=None) -> pv.Pair:
    """A latent site "late" that is drawn, in the programs named, with batches that have a flag."""
    encoder = nn.Linear(1, 1)

    def draw(flag):
        if flag if isinstance(flag, bool) else flag.sum() > 0:
            return pyro.sample("late", dist.Normal(0.0, 1.0), infer=infer)
        return 0.0

    def model(x, flag):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if "model" in late:
                z = z + draw(flag)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, flag):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 0.6))
            if "guide" in late:
                draw(flag)

    made = pv.Pair(model, guide)
    made.make_parameters(X, NONE)
    return made


def svi(made, estimator, engine="eager"):
    return pv.SVI(made, torch.optim.Adam(made.parameters(), 0.01), estimator, engine=engine)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize(("late", "lacks"), [("model", "guide"), ("guide", "model")])
def test_a_site_of_later_batches_in_one_of_the_two_is_named_with_the_step(estimator, engine, late, lacks):
    made = pair(late)
    taken = svi(made, estimator, engine)
    for _ in range(3):
        taken.step(X, NONE)
    before = [parameter.clone() for parameter in made.parameters()]
    message = f"^step 4: the {lacks} has no site 'late', which the {late} draws with this batch: both must"
    with pytest.raises(pv.GuideError, match=message):
        taken.step(X, ONE)
    assert all(map(torch.equal, made.parameters(), before))
    taken.step(X, NONE)
    with pytest.raises(pv.GuideError, match=f"^step 5: the {lacks} has no site"):  # a graph of its own
        taken.step(X[:4], ONE[:4])
    with pytest.raises(pv.GuideError, match=f"^the {lacks} has no site"):
        taken.evaluate_loss(X, ONE)


def test_a_flag_that_is_no_tensor():
    taken = svi(pair("model"), Trace_ELBO(), "traced")
    assert taken.step(X, False) > 0
    with pytest.raises(pv.GuideError, match="step 2: the guide has no site 'late'"):
        taken.step(X, True)


@pytest.mark.parametrize("estimator", [None, Trace_ELBO()])
def test_fit_names_epoch_and_step(estimator):
    flag = torch.zeros(40)
    flag[33] = 1
    with pytest.raises(
        pv.GuideError, match=r"^epoch 1, step \d+ of 10: the guide has no site 'late'"
    ) as error:
        pv.fit(pair("model"), (torch.randn(40), flag), estimator=estimator, batch_size=4, progress=False)
    assert "SVI" not in str(error.value)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_site_of_later_batches_in_both_is_right(estimator, engine):
    taken = svi(pair("model", "guide"), estimator, engine)
    assert all(taken.step(X, flag) > 0 for flag in (NONE, ONE, NONE, ONE))


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_what_estimators_take_is_right():
    auxiliary = svi(pair("guide", infer={"is_auxiliary": True}), Trace_ELBO())
    assert all(auxiliary.step(X, flag) > 0 for flag in (NONE, ONE))

    def model(x, flag):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if flag.sum() > 0:
                probs = torch.tensor([0.3, 0.7])
                z = z + pyro.sample("late", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    made = pv.Pair(model, pair().written.guide)
    made.make_parameters(X, NONE)
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), pv.IWAE(2)):
        summed = svi(made, estimator)
        assert all(summed.step(X, flag) > 0 for flag in (NONE, ONE))
    sampled = svi(made, Trace_ELBO())
    sampled.step(X, NONE)
    with pytest.raises(pv.GuideError, match="has no site 'late'"):
        sampled.step(X, ONE)
    assert svi(pair(), ReweightedWakeSleep(num_particles=2)).step(X, NONE)
