"""Comparisons of estimators on digits and on exactly solved models run with their options."""

import csv
import re
import runpy
from pathlib import Path

import pytest
import torch
import xarray
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("few_digits")

# Estimators compared

COMPARE = BENCHMARKS / "compare_elbos.py"
SMALL = "--epochs 1 --particles 2 --compare-size 4 --repeats 10 --batch-size 1000 --curve-size 5"
SMALL += " --curve-particles 3 --test-size 20 --test-particles 4 --budget 8steps"


def compare(monkeypatch, folder, *options):
    monkeypatch.setattr("sys.argv", [str(COMPARE), *SMALL.split(), "--output", str(folder), *options])
    runpy.run_path(str(COMPARE), run_name="__main__")


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_estimators_are_compared_on_digits(monkeypatch, tmp_path, capsys):
    compare(monkeypatch, tmp_path, "--train", "elbo:1", "miwae:2")
    figures = {"values.png", "snr_model.png", "snr_guide.png", "training.png"}
    tables = {"estimators.csv", "estimators.nc", "training.csv"}
    assert {path.name for path in tmp_path.iterdir()} == figures | tables
    names = [row["estimator"] for row in rows(tmp_path / "estimators.csv")]
    assert len(set(names)) >= 8
    assert xarray.load_dataset(tmp_path / "estimators.nc")["estimator"].values.tolist() == names
    trained = rows(tmp_path / "training.csv")
    assert [row["trained_with"] for row in trained] == ["Trace_ELBO()", "IWAE(2, num_groups=4)"]
    assert [row["steps"] for row in trained] == ["8", "8"]
    printed = capsys.readouterr().out
    assert f"{float(trained[1]['log_evidence']):.1f} ±" in printed


def test_estimators_are_compared_with_known_values(monkeypatch, tmp_path, capsys):
    compare(monkeypatch, tmp_path, "--model", "linear-gaussian", "--repeats", "20")
    _, table = capsys.readouterr().out.split("from 20 steps, and known; nats per datum\n")
    lines = [line for line in table.splitlines()[1:] if "±" in line]
    assert len(lines) == len(rows(tmp_path / "estimators.csv"))
    assert sum("exactly" in line for line in lines) == 5
    assert all(abs(float(line.split()[-1])) < 4 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "elob:1"), 'a name among elbo, .*; got "elob:1"'),
        (("--train", "stl"), 'must have the form "dreg:8"'),
        (("--train", "vimco:1"), "vimco:1: num_particles must be at least 2"),
        (("--budget", "soon"), 'must have the form "800steps"'),
        (("--budget", "0s"), 'must have the form "800steps"'),
        (("--repeats", "9"), "--repeats must be at least 10"),
        (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
        (("--checkpoint", "damaged.pt"), "damaged.pt"),
        (("--checkpoint", "other.pt"), r"shape \(\*, 6\).*got \(4, 1, 28, 28\)"),
        (("--checkpoint", "other.pt", "--model", "linear-gaussian"), "--checkpoint requires --model digits"),
        (("--output", "damaged.pt"), "damaged.pt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_comparing_answers_a_mistake_in_a_sentence(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("damaged.pt").write_bytes(b"no checkpoint")
    parts = {"likelihood": pv.likelihoods.Normal(2, (6,)), "guide": pv.guides.DiagonalNormal((6,), 2)}
    pv.VAE(prior=pv.priors.StandardNormal(2), **parts).save("other.pt")
    with pytest.raises(SystemExit) as stop:
        compare(monkeypatch, tmp_path / "out", *options)
    assert re.search(message, capsys.readouterr().err + str(stop.value))
    assert not (tmp_path / "out" / "estimators.csv").exists()


# A categorical and a continuous latent

MIXTURE = BENCHMARKS / "discrete_latents.py"


def test_a_mixture_is_trained_in_three_ways(monkeypatch, tmp_path, capsys):
    options = "--particles 3 --steps 4 --batch-size 5 --test-size 7 --draws 6 --output"
    monkeypatch.setattr("sys.argv", [str(MIXTURE), *options.split(), str(tmp_path)])
    runpy.run_path(str(MIXTURE), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {"evidence.png", "digits.png", "classes.png"}
    printed = capsys.readouterr().out
    for name in ("TraceEnum_ELBO", "TraceGraph_ELBO", "VIMCO"):
        assert len(re.findall(rf"^{name} .* ± ", printed, re.M)) == 2
    monkeypatch.setattr("sys.argv", [str(MIXTURE), "--particles", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(MIXTURE), run_name="__main__")
    assert "--particles must be at least 2" in capsys.readouterr().err


def test_at_the_exact_posterior_the_enumerated_elbo_is_the_evidence():
    example = runpy.run_path(str(MIXTURE))
    vae = example["solved"](seed=2)[0].double()
    W = vae.likelihood.network.weight
    W.data = torch.linalg.qr(W.data).Q * W.data.norm(dim=0)  # at right angles in float64 too
    mixture = example["marginal"](vae)
    x = example["sample"](mixture, 7)
    with torch.no_grad():
        set_to_posterior(vae)
        posterior = vae.encode(x)[0].softmax(-1)
    torch.testing.assert_close(posterior, mixture.posterior(x), rtol=0, atol=1e-10)
    evidence = mixture.log_evidence(x)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, config_enumerate(vae.guide), x)
    assert loss == pytest.approx(-evidence.sum().item(), abs=1e-10)
    found = pv.terms(vae.model, vae.guide, x, num_particles=3).log_weight
    torch.testing.assert_close(found, evidence.expand(3, 7), rtol=0, atol=1e-10)


def set_to_posterior(vae):
    """Let the guide of a linear model be p(c|x) p(z|x, c), from Bayes' rule for normals."""
    W, b = vae.likelihood.network.weight, vae.likelihood.network.bias
    noise, scale = vae.likelihood.scale**2, torch.nn.functional.softplus(vae.raw_scales[0]) + 1e-6
    means = vae.locs @ W.T  # of x − b, given c
    covariance = (W * scale.square()) @ W.T + noise * torch.eye(len(b), dtype=b.dtype)
    # log p(c|x) is linear in x, as the classes share their covariance
    slope = torch.linalg.solve(covariance, means.T).T
    offset = vae.logits.log_softmax(0) - (slope * means).sum(-1) / 2 - slope @ b
    # p(z|x, c) by adding up precisions, diagonal as the columns of W are at right angles
    variance = 1 / (scale**-2 + W.square().sum(0) / noise)
    gain = (variance.unsqueeze(-1) * W.T / noise).repeat(len(vae.logits), 1)
    loc = (variance * vae.locs / scale.square()).flatten() - gain @ b
    raw = torch.log(torch.expm1(variance.sqrt() - 1e-6)).repeat(len(vae.logits))
    vae.network.weight.copy_(torch.cat([slope, gain, torch.zeros_like(gain)]))
    vae.network.bias.copy_(torch.cat([offset, loc, raw]))
