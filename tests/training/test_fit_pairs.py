"""`fit` for whatever is written as a model and a guide: several arguments, latents, plates, masks."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    ReweightedWakeSleep,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.data.batches import Batches
from pyro_vae.data.sources import arguments
from pyro_vae.utils.isolation import derived_seed, seed_at

N = 11

pytestmark = pytest.mark.usefixtures("double")


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def two_latents_and_a_label():
    net = nn.Linear(4, 2)

    def model(x, y):
        weight = pyro.param("weight", torch.ones(2))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a.sum(-1), 0.5))
            pyro.sample(
                "x", dist.Normal((a * weight + b[:, None]).repeat(1, 2)[:, :3], 1.0).to_event(1), obs=x
            )
            pyro.sample("y", dist.Poisson(b.exp()), obs=y)

    def guide(x, y):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        h = net(torch.cat([x, y[:, None]], 1))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(h, scale).to_event(1))
            pyro.sample("b", dist.Normal(a.mean(-1), scale))

    return model, guide, (noise(N, 3), torch.arange(N) % 4)


def a_mask_and_a_label_that_may_be_none():
    def model(x, mask, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z, 2.0), obs=y)

    def guide(x, mask, y=None):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * torch.where(mask, x, torch.zeros(())), 0.8))

    return model, guide, {"x": noise(N), "mask": torch.arange(N) % 3 != 0, "y": None}


def nested_plates():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-2):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x.T)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(3, 1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1) / 2, 0.5))
            with pyro.plate("inner", 3, dim=-2):
                pyro.sample("w", dist.Normal(x.T / 2 + shift, 0.6))

    return model, guide, noise(N, 3)


def a_global_latent():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.2))
        pyro.sample(
            "mean", dist.Normal(loc, pyro.param("scale", torch.tensor(0.4), constraint=constraints.positive))
        )

    return model, guide, noise(N) + 2


def an_enumerated_latent():
    @config_enumerate
    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.5, 1.5]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(locs[k] + z, 0.5), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide, noise(N)


def sequences_with_lengths():
    cell = nn.GRUCell(1, 2)

    def model(x, length):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < length):
                    pyro.sample(f"x_{t}", dist.Normal(z.sum(-1) * (t + 1) / 3, 1.0), obs=x[:, t])

    def guide(x, length):
        pyro.module("cell", cell)
        state = torch.zeros(len(x), 2)
        for t in reversed(range(x.shape[1])):
            state = torch.where((t < length)[:, None], cell(x[:, t : t + 1], state), state)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(state, 0.5).to_event(1))

    return model, guide, (noise(N, 4), torch.arange(N) % 4 + 1)


ZOO = {
    "two latents and a label": (two_latents_and_a_label, TraceMeanField_ELBO),
    "a mask, and a label that may be None": (a_mask_and_a_label_that_may_be_none, TraceMeanField_ELBO),
    "nested plates": (nested_plates, TraceMeanField_ELBO),
    "a global latent": (a_global_latent, TraceMeanField_ELBO),
    "an enumerated latent": (an_enumerated_latent, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "sequences with lengths": (sequences_with_lengths, TraceMeanField_ELBO),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_fit_takes_the_steps_of_pyros_svi(name, engine):
    write, estimator = ZOO[name]
    torch.manual_seed(4)
    model, guide, data = write()
    pair = pv.Pair(model, guide)
    pair.make_parameters(*arguments(data)[0], **arguments(data)[1])
    other = copy.deepcopy(pair)
    history = pv.fit(
        pair, data, epochs=2, batch_size=4, learning_rate=0.02, seed=7, engine=engine, progress=False
    )

    upstream = pyro.infer.SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.02}), estimator())
    losses = []
    for epoch in range(2):
        total = 0.0
        for number, batch in enumerate(Batches(data, seed=7).epoch(epoch, batch_size=4)):
            torch.manual_seed(seed_at(derived_seed(7, 20, epoch), number))
            total += upstream.step(*arguments(batch)[0], **arguments(batch)[1])
        losses.append(-total / N)
    assert [epoch.train_bound for epoch in history] == pytest.approx(losses, rel=1e-6)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[key], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ZOO)
def test_every_pair_is_validated_stopped_and_resumed_to_the_bit(name, tmp_path):
    def make():
        torch.manual_seed(4)
        model, guide, data = ZOO[name][0]()
        return pv.Pair(model, guide), data

    options = {"batch_size": 4, "validation": 0.3, "kl_warmup": 2, "patience": 5, "progress": False}
    if name == "an enumerated latent":
        options["kl_warmup"] = 0  # of TraceEnum_ELBO there is no weighted form
    if name == "a global latent":
        options["kl_warmup"] = 0  # the weight belongs to terms of single examples
    whole, data = make()
    expected = pv.fit(whole, data, epochs=4, **options)
    parts, _ = make()
    pv.fit(parts, data, epochs=2, checkpoint_dir=tmp_path, **options)
    again, _ = make()
    found = pv.fit(again, data, epochs=4, checkpoint_dir=tmp_path, resume=True, **options)
    assert found.column("validation_elbo") == expected.column("validation_elbo")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in whole.state_dict().items())
    assert all(map(torch.isfinite, torch.tensor(expected.column("validation_elbo"))))
    best, _ = make()
    best.load(tmp_path / "best.pt")


class Both(nn.Module):
    """Pyro's way to write a VAE: a module with methods model and guide."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def test_a_module_with_model_and_guide_is_trained_in_place_and_goes_to_callbacks():
    torch.manual_seed(0)
    both, seen = Both(), []
    before = copy.deepcopy(both.state_dict())
    pv.fit(both, noise(N, 3), epochs=2, progress=False, callbacks=[lambda given, epoch: seen.append(given)])
    assert seen == [both, both]
    assert not any(torch.equal(before[key], value) for key, value in both.state_dict().items())


def test_functions_whose_parameters_would_be_lost_are_refused():
    model, guide, data = two_latents_and_a_label()
    with pytest.raises(ValueError, match=r"'scale', 'weight'.*lost after fit.*pyro_vae\.Pair"):
        pv.fit((model, guide), data, epochs=1, progress=False)


def test_a_tuple_of_a_model_and_a_guide_with_modules_is_trained():
    torch.manual_seed(0)
    both = Both()
    before = both.encoder.weight.detach().clone()
    pv.fit((both.model, both.guide), noise(N, 3), epochs=1, progress=False)
    assert not torch.equal(before, both.encoder.weight)


def test_a_guide_function_with_parameters_serves_a_vae(tmp_path):
    def make():
        torch.manual_seed(0)

        def guide(x):
            slope = pyro.param("slope", torch.zeros(3, 2))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ slope, 0.7).to_event(1))

        likelihood = pv.likelihoods.Normal(2, (3,), hidden_features=(4,))
        return pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide)

    x = noise(N, 3)
    vae, other = make(), make()
    pv.fit(vae, x, epochs=3, batch_size=4, progress=False)
    pv.fit(other, x, epochs=2, batch_size=4, checkpoint_dir=tmp_path, progress=False)
    resumed = make()
    pv.fit(resumed, x, epochs=3, batch_size=4, checkpoint_dir=tmp_path, resume=True, progress=False)
    assert torch.equal(resumed.stored.slope, vae.stored.slope)
    assert vae.stored.slope.abs().min() > 0
    vae.save(tmp_path / "vae.pt")
    loaded = pv.VAE.load(tmp_path / "vae.pt", into=make())
    assert torch.equal(loaded.encode(x).mean, vae.encode(x).mean)


def test_parameters_of_single_examples_train_where_the_batch_is_the_whole_set_and_else_raise():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = noise(N)
    pair = pv.Pair(model, AutoNormal(model))
    pv.fit(pair, x, epochs=400, batch_size=N, learning_rate=0.05, progress=False)
    loc = dict(pair.named_parameters())["programs.0.locs.z_unconstrained"]
    torch.testing.assert_close(loc.detach(), x / 1.01, rtol=0.1, atol=0.1)
    with pytest.raises(
        ValueError, match=r"the whole data set at once: fit\(\.\.\., batch_size=len\(data\)\)"
    ):
        pv.fit(pv.Pair(model, AutoNormal(model)), x, epochs=1, batch_size=4, progress=False)


BAD = {
    "another length": (lambda x, y: (x, y[:-1]), ValueError, r"same number of rows; got \[0\] 11, \[1\] 10"),
    "an unknown key": (
        lambda x, y: {"x": x, "label": y},
        TypeError,
        "got 'x', 'label' by name: .*'y'",
    ),
    "infinite": (lambda x, y: (torch.where(x > 1, torch.inf, x), y), ValueError, r"x\[0\]\[\d+, \d\] is inf"),
    "no rows": (lambda x, y: (None, None), ValueError, "no data"),
    "text": (lambda x, y: (x, ["a"] * N), TypeError, "got list|data must be"),
    "one argument": (lambda x, y: x, TypeError, "got 1 argument by position: missing .*'y'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_raise_with_what_and_where(name):
    change, kind, message = BAD[name]
    model, guide, (x, y) = two_latents_and_a_label()
    with pytest.raises(kind, match=message):
        pv.fit(pv.Pair(model, guide), change(x, y), epochs=1, progress=False)


def test_a_vae_takes_one_argument_and_says_so():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,)),
        guide=pv.guides.DiagonalNormal((3,), 2),
    )
    with pytest.raises(TypeError, match="a VAE takes x alone"):
        pv.fit(vae, (noise(N, 3), torch.zeros(N)), epochs=1, progress=False)


@pytest.mark.parametrize(
    "estimator",
    [ReweightedWakeSleep(), TraceTailAdaptive_ELBO(num_particles=3)],
    ids=["RWS", "tail adaptive"],
)
def test_estimators_without_a_bound_go_with_svi(estimator):
    model, guide, data = two_latents_and_a_label()
    with pytest.raises(ValueError, match="gives no bound per datum.*pyro_vae.SVI"):
        pv.fit(pv.Pair(model, guide), data, estimator=estimator, epochs=1, progress=False)


def test_bounds_divide_by_the_subsampling_and_by_no_other_scale():
    def write(scale):
        def model(x):
            with pyro.plate("data", 1000, subsample=x) as batch:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.scale(scale=scale):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

        def guide(x):
            slope = pyro.param("slope", torch.tensor(0.4))
            with pyro.plate("data", 1000, subsample=x) as batch:
                pyro.sample("z", dist.Normal(slope * batch, 0.7))

        return pv.Pair(model, guide)

    data = noise(N)
    for scale in (1.0, 10.0):
        pair = write(scale)
        (epoch,) = pv.fit(pair, data, epochs=1, batch_size=4, learning_rate=1e-12, seed=7, progress=False)
        total = 0.0
        for number, batch in enumerate(Batches(data, seed=7).epoch(0, batch_size=4)):
            torch.manual_seed(seed_at(derived_seed(7, 20, 0), number))
            z = pair.stored.slope.detach() * batch + 0.7 * torch.randn(len(batch))
            log_likelihood = scale * dist.Normal(z, 1.0).log_prob(batch)
            kl = torch.distributions.kl_divergence(
                dist.Normal(pair.stored.slope.detach() * batch, 0.7), dist.Normal(0.0, 1.0)
            )
            total += (log_likelihood - kl).sum().item()
        assert epoch.train_bound == pytest.approx(total / N, rel=1e-8)


def test_a_model_that_observes_nothing_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x, also=()):
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            for name in ("z", *also):
                pyro.sample(name, dist.Normal(0.0, scale))

    with pytest.raises(ValueError, match="or, if 'x' is data, pass them in the model as obs="):
        pv.fit(pv.Pair(model, guide), torch.zeros(7), epochs=1, progress=False)
    both = pv.Pair(model, lambda x: guide(x, ("x",)))
    with pytest.raises(ValueError, match="the model observes nothing"):
        pv.fit(both, torch.zeros(7), epochs=1, progress=False)


def test_the_validation_elbo_of_a_shared_latent_has_no_error():
    model, guide, x = a_global_latent()
    history = pv.fit(pv.Pair(model, guide), x, validation=x[:5], epochs=1, progress=False)
    assert math.isnan(history[0].validation_elbo_se)
    assert math.isfinite(history[0].validation_elbo)


def test_a_scale_below_zero_of_no_dimension_is_named():
    model, _, x = a_global_latent()

    def guide(x):
        pyro.sample(
            "mean", dist.Normal(pyro.param("m", torch.tensor(0.0)), pyro.param("s", torch.tensor(-1.0)))
        )

    with pytest.raises(ValueError, match=r"must satisfy GreaterThan\(lower_bound=0.0\); found -1"):
        pv.fit(pv.Pair(model, guide), x, epochs=1, progress=False)
