"""`fit` says once that steps have become slow, and not for a step that compiles."""

import itertools

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training.pace import Pace


def told(caplog, seconds):
    caplog.clear()
    pace = Pace()
    for each in seconds:
        pace.note(each)
    return [record.getMessage() for record in caplog.records]


def test_it_is_said_once(caplog):
    (message,) = told(caplog, [0.01] * 40 + [0.06] * 60)
    assert "a step takes 0.06 s now, 6 times as long as before" in message
    assert ("torch.set_num_threads(1)" in message) == (torch.get_num_threads() > 1)


@pytest.mark.parametrize(
    "seconds",
    [
        [0.01] * 30 + [20.0] + [0.01] * 40,  # a step that compiles
        [0.06] * 40 + [0.01] * 40,  # faster, once compiled
        [0.01] * 40 + [0.04] * 200,
        ([0.01] * 20 + [0.06] * 20) * 8,  # for a moment, again and again
        [0.06] * 40,
    ],
)
def test_it_is_not_said_otherwise(caplog, seconds):
    assert not told(caplog, seconds)


def test_fit_times_its_steps(caplog, monkeypatch):
    clock = itertools.accumulate(itertools.chain([0.0], itertools.repeat(0.001, 200), itertools.repeat(0.5)))
    monkeypatch.setattr("pyro_vae.training.run.time.perf_counter", lambda: next(clock))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((3,), 2, hidden_features=(4,)),
    )
    pv.fit(vae, torch.zeros(80, 3), epochs=3, batch_size=1, engine="eager", progress=False)
    assert [record.getMessage() for record in caplog.records if "times as long as before" in record.message]
