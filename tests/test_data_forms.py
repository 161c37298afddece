"""Data in any form that `fit` takes give the same numbers in every public function that takes data."""

import inspect
import math

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import applications

N, D, K = 23, 4, 2
NAMES = ["height", "mass", "age", "year"]
QUIET = {"progress": False}


def values() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(N, D))
    x[:, 1] = np.round(x[:, 1]).clip(0)  # with zeros, as sparse matrices leave them out
    return x


def on_disk(x, folder):
    with h5py.File(folder / "x.h5", "w") as file:
        file["x"] = x
    return h5py.File(folder / "x.h5")["x"]


FORMS = {
    "float64": lambda x, folder: x,
    "a view": lambda x, folder: np.asfortranarray(x[::-1])[::-1],
    "big-endian": lambda x, folder: x.astype(">f8"),
    "pandas": lambda x, folder: pd.DataFrame(x, columns=NAMES, index=range(5, 5 + N)),
    "polars": lambda x, folder: pl.DataFrame(dict(zip(NAMES, x.T, strict=True))),
    "sparse": lambda x, folder: scipy.sparse.csr_array(x),
    "h5py": on_disk,
}


def make_vae():
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, (D,), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((D,), K, hidden_features=(5,)),
    ).double()


def make_pair():
    vae = make_vae()
    return pv.Pair(vae.model, vae.guide)


def svi(pair):
    return pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.01))


def steps(pair, x):
    own = svi(pair)
    return [own.step(x) for _ in range(3)]


def trained(pair, x, **options):
    return pv.fit(pair, x, epochs=2, batch_size=9, **options, **QUIET).column("train_bound")


def held_out(pair, x):
    history = pv.fit(pair, torch.ones(5, D, dtype=torch.float64), epochs=1, validation=x, **QUIET)
    return history.column("validation_elbo")


def snr(pair, x):
    options = {"num_repeats": 10, "num_reference_particles": 5, **QUIET}
    return pv.compare_estimators(pair, data=x, estimators=[pv.IWAE(2)], **options)["snr"].values.tolist()


def scores(pair, x):
    return applications.anomaly_scores(pair, x, num_particles=3)["log_evidence"].values.tolist()


def flags(pair, x):
    detector = applications.AnomalyDetector(pair, contamination=0.2, num_particles=3).fit(x)
    return [*detector.score_samples(x).tolist(), *detector.p_value(x).tolist(), *detector.predict(x).tolist()]


def erased(pair, x):
    erase = applications.corruptions.Erase(torch.tensor([True, False, False, False]))
    return (
        applications.denoise(pair, x, corruption=erase, num_particles=20, num_draws=2).mean.flatten().tolist()
    )


def restored(pair, x):
    normal = applications.corruptions.Normal(0.3)
    return applications.denoise(pair, x, corruption=normal, num_particles=20).mean.flatten().tolist()


def imputed(pair, x):
    return applications.impute(pair, x, num_particles=9, num_draws=2).draws.flatten().tolist()


def typical(pair, x):
    batch = x if isinstance(x, torch.Tensor) else FORMS["float64"](values(), None)
    found = applications.batch_typicality(pair, batch[:3], reference=x, num_particles=3)
    return list(found)


def groups(pair, x):
    found = pv.to_inference_data(pair, x, num_samples=4, **QUIET)
    return found.posterior["z"].values.flatten().tolist()


OF_ANY_PAIR = {
    "fit": trained,
    "fit(validation=)": held_out,
    "evaluate": lambda pair, x: pv.evaluate(pair, x, num_particles=3, **QUIET).per_datum.elbo.tolist(),
    "annealed_importance_sampling": lambda pair, x: (
        pv.annealed_importance_sampling(pair, x, num_chains=2, num_temperatures=3, **QUIET).log_evidence
    ),
    "to_inference_data": groups,
    "compare_estimators": snr,
    "check_guide": lambda pair, x: str(pv.check_guide(pair, x)),
    "check_guide(model, guide)": lambda pair, x: str(pv.check_guide(pair.model, pair.guide, x)),
    "check_mean_field": lambda pair, x: pv.check_mean_field(pair.model, pair.guide, x),
    "terms": lambda pair, x: pv.terms(pair, x, num_particles=2).log_weight.flatten().tolist(),
    "SVI.step": steps,
    "SVI.step(x=)": lambda pair, x: svi(pair).step(x=x),
    "SVI.check": lambda pair, x: svi(pair).check(x),
    "SVI.evaluate_loss": lambda pair, x: svi(pair).evaluate_loss(x),
    "IWAE.loss": lambda pair, x: pv.IWAE(3).loss(pair.model, pair.guide, x),
    "STL.loss": lambda pair, x: pv.STL().differentiable_loss(pair.model, pair.guide, x).item(),
    "KLWeighted.loss": lambda pair, x: pv.KLWeighted(Trace_ELBO(), 0.5).loss(pair.model, pair.guide, x),
    "KLWeighted": lambda pair, x: (
        pv.KLWeighted(Trace_ELBO(), 0.5).differentiable_loss(pair.model, pair.guide, x).item()
    ),
}
OF_A_VAE = {
    "encode": lambda pair, x: pair.encode(x).mean.flatten().tolist(),
    "reconstruct": lambda pair, x: pair.reconstruct(x).flatten().tolist(),
    "log_joint": lambda pair, x: pair.log_joint(x, torch.ones(N, K, dtype=torch.float64)).tolist(),
    "anomaly_scores": scores,
    "AnomalyDetector": flags,
    "batch_typicality": typical,
    "impute": imputed,
    "denoise": restored,
    "denoise by Erase": erased,
}
CASES = {
    **{f"{name} of a VAE": (make_vae, call) for name, call in {**OF_ANY_PAIR, **OF_A_VAE}.items()},
    **{f"{name} of a Pair": (make_pair, call) for name, call in OF_ANY_PAIR.items()},
}


def results(make, call, x):
    pair = make()
    torch.manual_seed(2)
    found = call(pair, x)
    return found, [parameter.detach() for parameter in pair.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_each_form_gives_what_a_tensor_gives(case, tmp_path):
    make, call = CASES[case]
    expected, trained_to = results(make, call, torch.from_numpy(values()))
    for form, convert in FORMS.items():
        found, parameters = results(make, call, convert(values(), tmp_path))
        assert all(map(torch.equal, parameters, trained_to)), form
        if isinstance(expected, str | None):
            assert found == expected, form
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=form)


def test_all_public_functions_that_take_data_are_among_them():
    takes_none = {"Pooled", "export", "export_weights", "pool", "save_netcdf", "table_vae"}
    functions = {
        name
        for room in (pv, applications)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name)) and name not in takes_none
    }
    assert functions <= {name.partition(" ")[0] for name in CASES}


def test_images_are_taken_too():
    grey = torch.rand(9, 1, 3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    images = pv.data.from_array(grey).binarized("threshold")
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (1, 3, 3), hidden_features=(5,)),
        guide=pv.guides.DiagonalNormal((1, 3, 3), K, hidden_features=(5,)),
    )
    for call in (OF_ANY_PAIR["check_guide"], OF_ANY_PAIR["terms"], OF_ANY_PAIR["SVI.evaluate_loss"]):
        found = [results(lambda: vae, call, x)[0] for x in (images, images[:])]
        assert found[0] == found[1]


def test_a_frame_of_other_columns_than_those_trained_on_is_refused():
    frame = FORMS["pandas"](values(), None)
    vae = make_vae()
    trained(vae, frame)
    for call in (steps, OF_ANY_PAIR["terms"], OF_ANY_PAIR["check_guide"]):
        call(vae, frame)
        with pytest.raises(ValueError, match=r"training was on the columns \['height', 'mass', "):
            call(vae, frame[NAMES[::-1]])


def test_functions_get_what_is_given_as_in_pyro():
    met = []

    def model(x, scale):
        met.append((type(x), type(scale)))
        x = torch.tensor(np.array(x), dtype=torch.float32)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    guide(values()[:, 0], 1.0)
    parameter = pyro.param("loc").unconstrained()
    own = pv.SVI(model, guide, torch.optim.Adam([parameter]), Trace_ELBO(), engine="eager")
    for column in (values()[:, 0], pd.DataFrame(values())[0]):
        met.clear()
        assert math.isfinite(own.step(column, 2.0))
        pv.terms(model, guide, column, 2.0)
        pv.check_guide(model, guide, column, 2.0)
        assert set(met) == {(type(column), float)}
    pyro.clear_param_store()
