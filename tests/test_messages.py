"""An error names the argument that is wrong, and its remedy, followed word for word, works."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def make_vae(make=pv.VAE, **options):
    return make(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,), hidden_features=(4,), **options),
        guide=pv.guides.DiagonalNormal((3,), 2, hidden_features=(4,), **options),
    )


def fit(vae=None, data=X, **options):
    return pv.fit(vae or make_vae(), data, epochs=1, progress=False, **options)


def svi(*rest, **options):
    vae = make_vae()
    adam = torch.optim.Adam(vae.parameters())
    return pv.SVI(vae, *[adam if part is ... else part for part in rest], **options)


def adam():
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))])


CASES = [
    (lambda: fit(learning_rate="1e-3"), TypeError, "learning_rate must be a number; got '1e-3'"),
    (lambda: fit(kl_warmup="3"), TypeError, "kl_warmup must be a number; got '3'"),
    (lambda: fit(clip_norm="1"), TypeError, "clip_norm must be a number; got '1'"),
    (lambda: svi(..., clip_norm="1"), TypeError, "clip_norm must be a number; got '1'"),
    (lambda: fit(seed="a"), TypeError, "seed must be a non-negative integer; got 'a'"),
    (lambda: fit(seed=1.5), TypeError, "seed must be a non-negative integer; got 1.5"),
    (lambda: pv.evaluate(make_vae(), X, seed="a"), TypeError, "seed must be a non-negative integer; got 'a'"),
    (lambda: fit(optimizer=adam()), TypeError, "optimizer must be a function .*; got the object Adam"),
    (lambda: fit(optimizer="adam"), TypeError, "optimizer must be a function .*; got 'adam'"),
    (
        lambda: fit(optimizer=pyro.optim.Adam({"lr": 1e-3})),
        TypeError,
        "optimizer must make a torch optimiser; got .*PyroOptim .*, one of Pyro's",
    ),
    (lambda: fit(optimizer=lambda p: None), TypeError, "must return a torch optimiser; got NoneType"),
    (
        lambda: fit(schedule=torch.optim.lr_scheduler.StepLR(adam(), 10)),
        TypeError,
        "schedule must be a function .*; got the object StepLR",
    ),
    (
        lambda: fit(callbacks=print),
        TypeError,
        r"callbacks must be a list of functions, as in callbacks=\[f\]",
    ),
    (lambda: fit(callbacks=[3]), TypeError, "a callback must be a function of the pair and the epoch; got 3"),
    (lambda: pv.fit(pv.VAE, X), TypeError, "got the class VAE itself: build one"),
    (lambda: pv.evaluate(pv.VAE, X), TypeError, "got the class VAE itself: build one"),
    (lambda: fit(data={"y": X}), TypeError, "a VAE takes arguments by the names x; got a dict of 'y'"),
    (
        lambda: fit(make_vae(pv.ConditionalVAE, context_dim=2), {"x": X}),
        TypeError,
        "a ConditionalVAE takes arguments by the names x, y; got a dict of 'x'",
    ),
    (lambda: svi(Trace_ELBO(), ...), TypeError, r"optimizer and loss are exchanged: call SVI\(pair, "),
    (
        lambda: pv.check_guide(make_vae().guide, make_vae().model, X),
        pv.GuideError,
        "^the guide observes 'x', the model nothing: model and guide are exchanged$",
    ),
    (lambda: make_vae().sample("3"), TypeError, "num_samples must be an integer; got '3'"),
    (lambda: make_vae().sample(2.5), TypeError, "num_samples must be an integer; got 2.5"),
    (
        lambda: pv.likelihoods.Normal(2, (3,), network=nn.Linear),
        TypeError,
        "network .* the class Linear itself",
    ),
    (lambda: pv.guides.DiagonalNormal((3,), 2, network=nn.Linear), TypeError, "the class Linear itself"),
    (
        lambda: pv.VAE(
            prior=pv.likelihoods.Normal(2, (3,)),
            likelihood=pv.priors.StandardNormal(2),
            guide=pv.guides.DiagonalNormal((3,), 2),
        ),
        TypeError,
        "prior must return .* got a Normal, which takes z",
    ),
    (
        lambda: pv.guides.SemiAmortised(pv.guides.DiagonalNormal),
        TypeError,
        "SemiAmortised refines a guide .*; got <class 'pyro_vae.guides.DiagonalNormal'>",
    ),
    (lambda: pv.Renyi("2", 3), TypeError, "alpha must be a number; got '2'"),
    (lambda: pv.CIWAE("1", 3), TypeError, "beta must be a number; got '1'"),
    (lambda: pv.plots.training_curves([1, 2]), TypeError, r"history must be a dict .*columns\(\)"),
    (
        lambda: fit(binarize="dynamic"),
        ValueError,
        "got -.* to .*: scale each column to .*, or choose another likelihood",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_an_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_remedies_for_another_dtype_work():
    with pytest.raises(
        pv.GuideError, match=r"(?s)vae.to\(torch.float64\).*by .to\(torch.float64\) of their mod"
    ):
        pv.evaluate(make_vae(), X.double(), num_particles=3, progress=False)
    fit(make_vae().to(torch.float64), X.double())
    fit(make_vae(), X.double().to(torch.float32))


def test_remedies_of_fit_work():
    fit(optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3))
    fit(optimizer=torch.optim.Adam)
    pv.plots.training_curves(fit().columns())


def test_models_of_another_class_are_named(tmp_path):
    make_vae().save(tmp_path / "vae.pt")
    with pytest.raises(Exception, match="it is a VAE: call VAE.load"):
        pv.ConditionalVAE.load(tmp_path / "vae.pt")
    make_vae(pv.ConditionalVAE, context_dim=2).save(tmp_path / "conditional.pt")
    assert type(pv.VAE.load(tmp_path / "conditional.pt")) is pv.ConditionalVAE


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder: name the file in it"):
        pv.VAE.load(tmp_path)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(Exception, match="found a dict that torch.save wrote"):
        pv.VAE.load(tmp_path / "other.pt")
    with pytest.raises(pv.data.DataError, match="there is no file or folder '.*absent.npy'"):
        pv.data.load(str(tmp_path / "absent.npy"))


def test_an_array_of_objects_is_not_called_damaged(tmp_path):
    path, images = tmp_path / "objects.npy", np.empty(2, object)
    images[:] = [np.zeros((4, 4)), np.ones((4, 4))]
    np.save(path, images, allow_pickle=True)
    with pytest.raises(pv.data.DataError, match="contains Python objects.*: save numbers") as error:
        pv.data.load(str(path))
    assert "damaged" not in str(error.value)
    np.save(path, np.stack(list(images)).astype(np.uint8))  # as the message says
    assert len(pv.data.load(str(path))) == 2


def test_a_grey_level_above_1_is_to_be_divided():
    grey = torch.randint(0, 256, (12, 3), generator=torch.Generator().manual_seed(0)).float()
    with pytest.raises(ValueError, match="divide those of 0..255 by 255"):
        fit(data=grey, binarize="dynamic")


def test_a_pair_that_trains_is_not_called_exchanged():
    vae = make_vae()
    assert pv.check_guide(vae.model, vae.guide, X).estimators
    assert isinstance(svi(..., TraceMeanField_ELBO()).step(X), float)


def test_fit_with_a_parameter_of_later_batches_says_how_to_make_it():
    def model(x, late):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide(x, late):
        loc = pyro.param("early", torch.tensor(0.0))
        if late.sum() > 0:
            loc = loc + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(loc, 1.0))

    x, late = torch.randn(12), torch.zeros(12)
    late[8] = 1
    options = {"batch_size": 2, "epochs": 1, "progress": False}
    with pytest.raises(
        ValueError, match=r"does not hold 'late' .* as pair.make_parameters\(\*batch\) before f"
    ):
        pv.fit(pv.Pair(model, guide), (x, late), **options)
    pair = pv.Pair(model, guide)
    pair.make_parameters(x, late)  # as the message says
    pv.fit(pair, (x, late), **options)


def test_messages_name_enumeration_among_the_estimators():
    for call in (lambda: svi(..., 3), lambda: fit(estimator=3)):
        with pytest.raises(TypeError, match="TraceEnum_ELBO"):
            call()


def regression(*, declared=True):
    """A model of x and of a number y, which is drawn where it is not given."""
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x, y=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            of_x = dist.Normal(decoder(z), 1.0)
            pyro.sample("x", of_x.to_event(1) if declared else of_x, obs=x)
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)

    def guide(x, y=None):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return pv.Pair(model, guide)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: fit(regression(), (X, y[:, None])), r"values observed at the site 'y'.*y.squeeze\(-1\)"),
        (
            lambda y: fit(regression(declared=False), (X, y)),
            r"site 'x' has 3 entries at dim -1.*to_event\(1\)",
        ),
        (lambda y: fit(regression(), X), r"no site 'y'(.|\n)*called with y=None"),
        (lambda y: fit(regression(), (X.double(), y)), r"parameter 'encoder.weight' is torch.float32"),
        (
            lambda y: fit(regression(), (X, y), validation=(X[:, :2], y)),
            "not on the validation data: the guide fails",
        ),
        (lambda y: fit(validation=X[:5, :2]), r"the validation data: x must have shape \(N, 3\)"),
        (lambda y: pv.check_guide(regression(), (X, y)), "must be Tensor, not tuple"),
    ],
)
def test_data_of_a_pair_that_do_not_fit_it(call, message):
    y = torch.arange(12.0)
    with pytest.raises(ValueError, match=message):
        call(y)
    assert len(fit(regression(), (X, y), validation=(X[:5], y[:5]))) == 1


def test_estimators_are_compared_on_arrays_as_on_tensors():
    vae, estimators = make_vae(), [Trace_ELBO(), pv.IWAE(3)]
    options = {"num_repeats": 10, "num_reference_particles": 5, "progress": False}
    a, b = (pv.compare_estimators(vae, x, estimators, **options) for x in (X.double().numpy(), X))
    assert a.to_dataframe()["value"].tolist() == b.to_dataframe()["value"].tolist()
