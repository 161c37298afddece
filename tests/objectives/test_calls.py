"""One way to call: a pair, or a model and a guide, in every function that takes them."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from contexts import conditional, semi_supervised, with_few_classes
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate

import pyro_vae as pv

X, Y = torch.randn(5, 3), torch.randn(5)


def model(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None] + y[:, None], 1.0).to_event(1), obs=x)


def guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(1), pyro.param("scale", torch.tensor(0.7))))


@pytest.fixture
def pair():
    pair = pv.Pair(model, guide)
    pair.make_parameters(X, Y)
    return pair


def test_terms_and_check_guide(pair):
    torch.manual_seed(0)
    t = pv.terms(pair, X, y=Y, num_particles=2)
    torch.manual_seed(0)
    assert torch.equal(t.log_weight, pv.terms(pair.model, pair.guide, X, Y, num_particles=2).log_weight)
    assert str(pv.check_guide(pair, X, Y)) == str(pv.check_guide(pair.model, pair.guide, X, Y))


@pytest.mark.parametrize("batch", [(X, Y), {"x": X, "y": Y}], ids=["tuple", "dict"])
def test_one_batch_as_fit_takes_it(pair, batch):
    assert str(pv.check_guide(pair, batch)) == str(pv.check_guide(pair, X, Y))
    assert str(pv.check_guide(pair.model, pair.guide, batch)) == str(pv.check_guide(pair, X, Y))
    torch.manual_seed(0)
    t = pv.terms(pair, batch, num_particles=2)
    torch.manual_seed(0)
    assert torch.equal(t.log_weight, pv.terms(pair, X, Y, num_particles=2).log_weight)
    stars = "*" * (1 + isinstance(batch, dict))
    svi = pv.SVI(pair, torch.optim.Adam(pair.parameters()))
    message = rf"got one {type(batch).__name__}\. Pass the items of the .* {'.' * len(stars)}batch$"
    for call in (svi.step, svi.check, svi.evaluate_loss):
        with pytest.raises(TypeError, match=message):
            call(batch)
    with pytest.raises(
        TypeError, match=r"takes \(x, y\).*: missing a required argument: 'y'\. Pass the items"
    ):
        pv.Pair(model, guide).make_parameters(batch)


def test_one_batch_of_a_vae_with_a_class():
    vae, (x, y) = semi_supervised().float(), with_few_classes()
    assert str(pv.check_guide(vae, (x, y))) == str(pv.check_guide(vae, x, y))
    assert pv.terms(vae, {"x": x, "y": y}).elbo.shape == (1, len(x))
    assert pv.check_guide(conditional(), (x, y.clamp(min=0))).sites


def test_a_program_of_one_tuple_gets_it_whole():
    def of_two(batch):
        return model(*batch)

    def guide_of_two(batch):
        return guide(*batch)

    def or_one(batch, other=None):
        return model(*batch)

    def guide_or_one(batch, other=None):
        return guide(*batch)

    with pyro.get_param_store().scope():
        assert pv.terms(of_two, guide_of_two, (X, Y)).elbo.shape == (1, 5)
        assert pv.terms(or_one, guide_or_one, (X, Y)).elbo.shape == (1, 5)
        assert pv.check_guide(functools.partial(model), functools.partial(guide, y=Y), X, y=Y).sites


BATCHES = {
    "a wrong name": ({"x": X, "z": Y}, r"the model takes \(x, y\); got 'x', 'z' by name: .*'y'"),
    "too many": ((X, Y, X), r"the model takes \(x, y\); got 3 arguments by position: too many"),
    "too few": (X, r"the model takes \(x, y\); got 1 argument by position: .*'y'\. A batch for fit"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_other_arguments(pair, name):
    batch, message = BATCHES[name]
    for call in (pv.fit, pv.evaluate, pv.to_inference_data, pv.annealed_importance_sampling):
        with pytest.raises(TypeError, match=message):
            call(pair, batch, progress=False)
    with pytest.raises(TypeError, match=message):
        pv.compare_estimators(pair, batch, [Trace_ELBO()])
    args, kwargs = (
        ((), batch) if isinstance(batch, dict) else (batch if isinstance(batch, tuple) else (X,), {})
    )
    for call in (pv.check_guide, pv.terms):
        with pytest.raises(TypeError, match=message):
            call(pair, *args, **kwargs)
    for loss in (None, Trace_ELBO()):
        svi = pv.SVI(pair, torch.optim.Adam(pair.parameters()), loss)
        for call in (svi.step, svi.evaluate_loss):
            with pytest.raises(TypeError, match=message):
                call(*args, **kwargs)


def test_a_type_error_of_the_programs_own_is_left_as_it_is(pair):
    def fails(x, y):
        return len(3)

    with pytest.raises(TypeError, match="^object of type 'int' has no len"):
        pv.terms(fails, guide, X, Y)
    pyro.clear_param_store()


def test_compare_estimators_without_estimators(pair):
    with pytest.raises(
        TypeError, match=r"a list of estimators, such as .*; got no estimators: call compare_est"
    ):
        pv.compare_estimators(pair, (X, Y))
    with pytest.raises(TypeError, match=r"must be a list .*: write \[IWAE\(2\)\]"):
        pv.compare_estimators(pair, (X, Y), pv.IWAE(2))


def test_compare_estimators_with_several_arguments(pair):
    options = {"num_repeats": 10, "progress": False}
    estimators = [Trace_ELBO(), pv.IWAE(3)]
    by_pair = pv.compare_estimators(pair, (X, Y), estimators, **options)
    apart = pv.compare_estimators(pair.model, pair.guide, {"x": X, "y": Y}, estimators, **options)
    assert by_pair["value"].equals(apart["value"])


def test_svi_takes_a_pair_and_chooses_a_loss(pair):
    svi = pv.SVI(pair, torch.optim.Adam(pair.parameters()))
    assert svi.step(X, Y) > 0
    assert isinstance(svi.loss, TraceMeanField_ELBO)
    assert pv.SVI(pair, torch.optim.Adam(pair.parameters()), pv.IWAE(2)).step(X, Y) > 0
    assert pv.SVI(pair, optimizer=torch.optim.Adam(pair.parameters())).evaluate_loss(X, Y) > 0
    with pyro.get_param_store().scope():
        guide(X, Y)
        held = [parameter for _, parameter in pyro.get_param_store().named_parameters()]
        assert pv.SVI((model, guide), torch.optim.Adam(held)).step(X, Y) > 0


def test_the_default_loss_suits_the_pair():
    def draws_a_class(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(2)))

    def observes(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    from pyro_vae.inference.svi import default_loss

    assert type(default_loss(observes, draws_a_class, Y)) is Trace_ELBO
    assert type(default_loss(config_enumerate(observes), lambda x: None, Y)) is TraceEnum_ELBO


@pytest.mark.parametrize(
    "call",
    [
        lambda: pv.terms(3, X),
        lambda: pv.terms(model),
        lambda: pv.check_guide(torch.nn.Linear(3, 3), 3),
        lambda: pv.SVI(model, torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
        lambda: pv.compare_estimators(model, X, [Trace_ELBO()]),
        lambda: pv.compare_estimators((model, guide), X),
    ],
    ids=["a number", "a model alone", "modules", "no guide", "no guide in comparison", "no estimators"],
)
def test_a_wrong_call_shows_the_right_one(call):
    with pytest.raises(TypeError, match=r"call (terms|check_guide|SVI|compare_estimators)\(pair, "):
        call()


DEEP = "the plate 'data' lies at dim=-2, .*: pass max_plate_nesting=2, to the estimator, as in IWAE"


def test_a_data_plate_left_of_another_names_max_plate_nesting():
    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True) * pyro.param("w", torch.tensor(0.5)), 0.6))

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 1), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    pair = pv.Pair(model, guide)
    pair.make_parameters(X)
    vectorised = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    quiet = {"progress": False}
    for call in (
        lambda: pv.terms(pair, X, num_particles=4),
        lambda: pv.evaluate(pair, X, num_particles=4, **quiet),
        lambda: pv.to_inference_data(pair, X, num_samples=4, **quiet),
        lambda: pv.annealed_importance_sampling(pair, X, num_temperatures=2, **quiet),
        *(
            lambda loss=loss: pv.fit(pair, X, estimator=loss, epochs=1, **quiet)
            for loss in (pv.IWAE(2), pv.KLWeighted(pv.DReG(2), 0.5), vectorised)
        ),
    ):
        with pytest.raises(ValueError, match=DEEP):
            call()
    pv.fit(pair, X, estimator=pv.IWAE(2, max_plate_nesting=2), epochs=1, **quiet)
    assert pv.evaluate(pair, X, num_particles=4, max_plate_nesting=2, **quiet).pareto_k.shape == (5,)
