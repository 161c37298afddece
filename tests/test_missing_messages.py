"""NaN in data, where it may mean missing: one message, whose remedies work, wherever data are taken."""

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

MESSAGE = r"x\[3, 1\] is nan: where NaN means missing, pass observed=~x.isnan\(\) of a tensor"


@pytest.fixture
def vae() -> pv.VAE:
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (5,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((5,), 2, hidden_features=(4,)),
    )


def with_nan() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    x[3, 1] = np.nan
    return x


CALLS = {
    "encode": lambda vae, x: vae.encode(x),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "terms": pv.terms,
    "compare_estimators": lambda vae, x: pv.compare_estimators(
        vae, data=x, estimators={"elbo": pv.IWAE(1)}, num_repeats=10
    ),
}


@pytest.mark.parametrize(
    "make", [torch.from_numpy, np.asarray, pd.DataFrame], ids=["tensor", "array", "frame"]
)
@pytest.mark.parametrize("name", CALLS)
def test_the_cell_is_named_and_a_remedy(vae: pv.VAE, name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        CALLS[name](vae, make(with_nan()))


def test_a_step_and_a_check_offer_the_remedy(vae: pv.VAE) -> None:
    svi = pv.SVI(vae, torch.optim.Adam(vae.parameters()))
    for call in (svi.step, lambda x: pv.check_guide(vae, x)):
        with pytest.raises(ValueError, match=r"x\[3, 1\] = nan .*; where NaN means missing, pass observed="):
            call(with_nan())


def test_a_pair_that_takes_no_mask_is_offered_none() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 5]).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, pyro.param("scale", torch.ones(())).exp()))

    pair = pv.Pair(model, guide)
    pair.make_parameters(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"x\[3, 1\] = nan") as raised:
        pv.SVI(pair, torch.optim.Adam(pair.parameters())).step(with_nan())
    assert "observed=" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (torch.from_numpy, lambda x: ~x.isnan()),
        (np.asarray, lambda x: ~np.isnan(x)),
        (pd.DataFrame, lambda x: ~x.isna()),
    ],
    ids=["tensor", "array", "frame"],
)
def test_the_remedies_work(vae: pv.VAE, make: Any, observed: Any) -> None:
    x = make(with_nan())
    mask = torch.from_numpy(~np.isnan(with_nan()))
    expected = vae.encode(torch.from_numpy(with_nan()), observed=mask).mean
    torch.testing.assert_close(vae.encode(x, observed=observed(x)).mean, expected)
    assert vae.log_joint(x, torch.zeros(7, 2), observed=observed(x)).isfinite().all()
    svi = pv.SVI(vae, torch.optim.Adam(vae.parameters()))
    assert np.isfinite(svi.step(x, observed=observed(x)))
    assert np.isfinite(pv.terms(vae, x, observed=observed(x)).elbo.sum().item())
