"""What a user of pairs meets: shared latents, forgotten modules, loading, parameters for each example."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.utils.serialization import CheckpointError

Y = torch.randn(60, generator=torch.Generator().manual_seed(2)) + 3


def shared_model(y, size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(y), subsample=torch.arange(len(y)) if size else None):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def shared_guide(y):
    scale = pyro.param("scale", torch.tensor(0.1), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(3.0)), scale))


def fit(pair, data, **options):
    return pv.fit(pair, data, **({"epochs": 1, "progress": False, "engine": "eager"} | options))


def test_a_latent_that_all_data_share_is_warned_of_where_batches_count_it_again(caplog):
    fit(pv.Pair(shared_model, shared_guide), Y, batch_size=20)
    assert "all data share the latent site 'mean', but each batch of 20 counts its KL in full" in caplog.text
    caplog.clear()
    fit(pv.Pair(shared_model, shared_guide), Y, batch_size=60)
    fit(pv.Pair(lambda y: shared_model(y, 60), shared_guide), Y, batch_size=20)
    assert not caplog.records


def test_the_remedies_give_the_exact_posterior():
    exact = (1 + len(Y)) ** -0.5
    for model, batch_size in ((shared_model, 60), (lambda y: shared_model(y, 60), 20)):
        pair = pv.Pair(model, shared_guide)
        fit(pair, Y, batch_size=batch_size, epochs=400, learning_rate=0.02)
        assert float(pair.stored.tensors["scale"].detach().exp()) == pytest.approx(exact, rel=0.15)


def test_a_module_that_the_model_forgets_to_name_is_warned_of(caplog):
    decoder, encoder = torch.nn.Linear(2, 6), torch.nn.Linear(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    fit(pv.Pair(model, guide), torch.randn(9, 6))
    assert "the model's site 'x' depends on a parameter of shape (6," in caplog.text
    assert "Name its module by pyro.module in the model, or freeze it" in caplog.text
    caplog.clear()
    decoder.requires_grad_(False)
    fit(pv.Pair(model, guide), torch.randn(9, 6))
    assert not caplog.records


def test_a_file_of_other_names_is_refused_when_the_programs_run(tmp_path):
    pair = pv.Pair(shared_model, shared_guide)
    fit(pair, Y, batch_size=60)
    pair.save(tmp_path / "pair.pt")

    def renamed(y):
        pyro.sample("mean", dist.Normal(pyro.param("renamed", torch.tensor(3.0)), 0.1))

    other = pv.Pair(shared_model, renamed).load(tmp_path / "pair.pt")
    with pytest.raises(ValueError, match="the loaded file holds .*, which the programs do not name"):
        pv.evaluate(other, Y, num_particles=3, progress=False)


def test_an_autoguide_is_loaded_before_it_has_run(tmp_path):
    pair = pv.Pair(shared_model, AutoNormal(shared_model))
    fit(pair, Y, batch_size=60, epochs=3)
    pair.save(tmp_path / "pair.pt")
    loaded = pv.Pair(shared_model, AutoNormal(shared_model)).load(tmp_path / "pair.pt")
    one, other = (pv.evaluate(p, Y, num_particles=5, progress=False) for p in (pair, loaded))
    assert one.elbo == other.elbo
    again = pv.Pair(shared_model, AutoNormal(shared_model)).load(tmp_path / "pair.pt")
    again.make_parameters(Y)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), again.parameters(), strict=True))
    wrong = pv.Pair(shared_model, AutoNormal(shared_model)).load(tmp_path / "pair.pt")
    assert wrong.pending is not None
    with pytest.raises((CheckpointError, RuntimeError)):
        wrong.load_state_dict({"programs.0.nothing": torch.zeros(1)})


def local_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_guide(y):
    loc = pyro.param("loc", torch.zeros(len(Y)))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def hierarchical(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("estimator", [None, Trace_ELBO()], ids=["default", "given"])
def test_parameters_of_each_example_train_and_are_evaluated_with_all_at_once(estimator):
    pair = pv.Pair(local_model, local_guide)
    fit(pair, Y, batch_size=60, estimator=estimator)
    assert pv.evaluate(pair, Y, num_particles=5, progress=False).elbo < 0


def test_a_hierarchical_model_with_an_autoguide_is_evaluated_as_a_whole():
    pair = pv.Pair(hierarchical, AutoNormal(hierarchical))
    fit(pair, Y, batch_size=60)
    report = pv.evaluate(pair, Y, num_particles=5, progress=False)
    assert report.log_evidence is None
    assert "lies outside the data plate" in report.reason


def test_a_generator_function_must_be_called():
    def stream():
        yield Y

    with pytest.raises(TypeError, match=r"data is the function stream: pass what it returns, stream\(\)"):
        fit(pv.Pair(local_model, local_guide), stream, steps_per_epoch=2)
