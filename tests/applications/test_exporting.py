"""Exported programs compute what the VAE does, without it; what has no mean is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import pyro_vae as pv

IMAGE, K = (1, 8, 8), 3


def make(likelihood="Bernoulli", guide="DiagonalNormal", network="conv"):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=getattr(pv.likelihoods, likelihood)(K, IMAGE, network=network),
        guide=getattr(pv.guides, guide)(IMAGE, K, network=network),
    )


@pytest.mark.parametrize(
    ("likelihood", "guide", "network"),
    [("Bernoulli", "DiagonalNormal", "conv"), ("StudentT", "LowRankNormal", None)],
)
def test_programs_compute_what_the_vae_does(tmp_path, likelihood, guide, network):
    vae = make(likelihood, guide, network)
    pv.applications.export(vae, tmp_path / "new")
    x, z = torch.rand(7, *IMAGE), torch.randn(5, K)
    encoder, decoder = (
        torch.export.load(tmp_path / "new" / f"{name}.pt2").module() for name in ("encoder", "decoder")
    )
    q, found = vae.encode(x), encoder(x)
    torch.testing.assert_close(found["mean"], q.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["standard_deviation"], q.stddev, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decoder(z)["mean"], vae.decode(z).mean, rtol=1e-5, atol=1e-6)
    described = json.loads((tmp_path / "new" / "programs.json").read_text())
    assert described["encoder"]["input"] == {"x": {"shape": ["N", *IMAGE], "dtype": "float32"}}
    assert described["decoder"]["output"] == {"mean": {"shape": ["N", *IMAGE], "dtype": "float32"}}
    assert vae.training


def test_a_program_runs_without_this_package(tmp_path):
    vae = make(network=None)
    pv.applications.export(vae, tmp_path)
    code = f"""
import sys, torch
program = torch.export.load({str(tmp_path / "decoder.pt2")!r}).module()
print(program(torch.ones(1, {K}))["mean"].sum().item(), "pyro" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    value, imported = run.stdout.split()
    assert float(value) == pytest.approx(vae.decode(torch.ones(1, K)).mean.sum().item(), rel=1e-5)
    assert imported == "False"


def test_what_has_no_mean_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the guide, a Flow, has no mean and standard deviation"):
        pv.applications.export(make(guide="Flow", network=None), tmp_path)
    vae = make(network=None)
    refined = vae.with_guide(pv.guides.SemiAmortised(vae.posterior))
    with pytest.raises(ValueError, match=r"takes gradient steps.*vae.posterior"):
        pv.applications.export(refined, tmp_path)
    with pytest.raises(ValueError, match="the guide is a Pyro function"):
        pv.applications.export(vae.with_guide(vae.guide), tmp_path)
    with pytest.raises(TypeError, match="export takes a pyro_vae.VAE; got Linear"):
        pv.applications.export(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["flow", "shared"])
def test_weights_are_read_back_as_they_were(name, tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    guide = pv.guides.Flow((6,), 2, flow="nsf") if name == "flow" else pv.guides.DiagonalNormal((6,), 2)
    prior = (
        pv.priors.VampPrior(guide, num_components=4, event_shape=(6,))
        if name == "shared"
        else pv.priors.StandardNormal(2)
    )
    vae = pv.VAE(prior=prior, likelihood=pv.likelihoods.Normal(2, (6,), variance="shared"), guide=guide)
    vae = vae.double() if name == "flow" else vae
    path = tmp_path / "vae.safetensors"
    path.write_text("an earlier file")
    pv.applications.export_weights(vae, path)
    found, expected = load_file(path), vae.state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    other = copy.deepcopy(vae)
    torch.nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(found)
    x = torch.rand(5, 6, dtype=next(vae.parameters()).dtype)
    torch.manual_seed(1)
    first = vae.reconstruct(x)
    torch.manual_seed(1)
    assert torch.equal(other.reconstruct(x), first)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_weights_need_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install .pyro_vae\[safetensors\]"):
        pv.applications.export_weights(make(network=None), tmp_path / "vae.safetensors")
    with pytest.raises(TypeError, match="takes a pyro_vae.VAE or another module; got dict"):
        pv.applications.export_weights({}, tmp_path / "vae.safetensors")

    class WithState(torch.nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    with pytest.raises(TypeError, match="'_extra_state' of the state is a dict"):
        pv.applications.export_weights(WithState(2, 3), tmp_path / "vae.safetensors")
    assert not any(tmp_path.iterdir())
