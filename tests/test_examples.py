"""The examples run with their options, and report invalid options in one line."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae.data import Images

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist_svi.py"
FILES = {"best.pt", "elbo.png", "history.csv", "last.pt", "latent.png", "metrics.json", "reconstructions.png"}


@pytest.fixture
def _few_digits(monkeypatch):
    """Let the bundled digits be 500 for training and 125 for tests."""
    load = pv.data.load

    def load_few(dataset, **options) -> Images:
        images = load(dataset, **options)
        return images.subset(torch.arange(len(images)) % 8 == 0) if dataset == "digits" else images

    monkeypatch.setattr(pv.data, "load", load_few)


pytestmark = pytest.mark.usefixtures("_few_digits")


def run(monkeypatch, folder, *options):
    arguments = [
        str(EXAMPLE),
        "--dataset",
        "digits",
        "--epochs",
        "1",
        "--hidden",
        "20",
        "--output",
        str(folder),
    ]
    if "--conv" in options:
        arguments[5:7] = []
    monkeypatch.setattr("sys.argv", [*arguments, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--latent-dim", "1", "--estimator", "trace", "--particles", "3"),
        ("--likelihood", "discretized-logistic", "--latent-dim", "2", "--estimator", "iwae", "--groups", "2"),
        ("--likelihood", "normal", "--conv", "--beta", "0.5", "--free-bits", "0.1", "--batch-size", "250"),
        ("--guide", "full", "--prior", "learned", "--batch-size", "250"),
        ("--guide", "iaf", "--prior", "mixture", "--conv", "--batch-size", "250"),
        ("--guide", "semi-amortised", "--prior", "vamp", "--latent-dim", "1", "--batch-size", "250"),
        (
            "--likelihood",
            "continuous-bernoulli",
            "--estimator",
            "dreg",
            "--particles",
            "2",
            "--engine",
            "traced",
        ),
    ],
    ids=" ".join,
)
def test_the_example_writes_model_metrics_and_figures(monkeypatch, tmp_path, capsys, options):
    run(monkeypatch, tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} >= FILES | {"samples.png", "vae.pt"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"test ELBO {metrics['test_elbo']:.2f} ± {metrics['test_elbo_se']:.2f} nats per image" in printed
    closed = "mixture" not in options and "vamp" not in options
    if "--estimator" not in options:
        assert metrics["settings"]["estimator"] == ("trace-mean-field" if closed else "trace")
    is_discrete = metrics["settings"]["likelihood"] in ("bernoulli", "discretized-logistic")
    assert (metrics["bits_per_dimension"] is not None) == is_discrete
    if is_discrete:
        assert metrics["bits_per_dimension"] == pytest.approx(-metrics["test_elbo"] / 784 / np.log(2))


class SeenError(ValueError):
    """Raised with the images that an example hands on."""


def test_judge_evaluates_the_test_images_of_training(monkeypatch, tmp_path):
    def hand_on(*args, validation=None, **options):
        raise SeenError(args[1] if validation is None else validation)

    def seen(file, *options):
        monkeypatch.setattr("sys.argv", [str(EXAMPLE.with_name(file)), *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLE.with_name(file)), run_name="__main__")
        return stop.value.__context__.args[0]

    parts = {
        "likelihood": pv.likelihoods.Bernoulli(2, (1, 28, 28), hidden_features=(3,)),
        "guide": pv.guides.DiagonalNormal((1, 28, 28), 2, hidden_features=(3,)),
    }
    pv.VAE(prior=pv.priors.StandardNormal(2), **parts).save(tmp_path / "vae.pt")
    monkeypatch.setattr(pv, "fit", hand_on)
    monkeypatch.setattr(pv, "evaluate", hand_on)
    data = ("--dataset", "digits", "--seed", "3", "--output", str(tmp_path / "out"))
    tested = seen("mnist_svi.py", *data)
    judged = seen("judge.py", str(tmp_path / "vae.pt"), *data, "--images", "70")
    assert len(tested) == 125
    assert torch.equal(tested[:70], judged[:])
    assert torch.equal(tested[:], tested[:])  # the same in each epoch


def test_the_example_resumes(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path, "--epochs", "2", "--resume")
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2"]


def test_the_example_accepts_user_images(monkeypatch, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (50, 3, 6, 8), dtype=np.uint8))
    run(monkeypatch, tmp_path / "out", "--dataset", str(tmp_path / "mine.npy"), "--batch-size", "10")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "mnits"), "mnist"),
        (("--device", "tpu"), "--device tpu cannot be used here"),
        (
            ("--guide", "nsf", "--estimator", "trace-mean-field"),
            "none is known for --guide nsf .*use --estimator trace",
        ),
        (
            ("--prior", "mixture", "--free-bits", "0.1"),
            "free bits need the KL of the site 'z' in closed form",
        ),
        (("--estimator", "vimco"), "num_particles must be at least 2"),
        (("--binarize", "none"), r"outside the support of Bernoulli.*binarize="),
        (("--conv", "--hidden", "30"), "--hidden cannot be combined with --conv"),
        (("--epochs", "0"), "--epochs must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_example_answers_a_mistake_in_a_sentence(monkeypatch, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path / "out", *options)
    said = capsys.readouterr().err + str(stop.value)
    assert re.search(message, said)
    assert "Traceback" not in said


# Estimators compared

COMPARE = EXAMPLE.with_name("compare_elbos.py")
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

MIXTURE = EXAMPLE.with_name("mixture.py")


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


def test_conditional_vae(monkeypatch, tmp_path, capsys):
    path = EXAMPLE.parent / "conditional_vae.py"
    options = ["--epochs", "1", "--width", "10", "--test-size", "20", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert "error of p(y|x)" in capsys.readouterr().out
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_semi_supervised(monkeypatch, tmp_path, capsys):
    path = EXAMPLE.parent / "semi_supervised.py"
    options = ["--epochs", "1", "--epochs-features", "1", "--latent-dim", "3", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert "semi-supervised  error" in capsys.readouterr().out
    assert (tmp_path / "samples.png").exists()


def test_sequences(monkeypatch, tmp_path, capsys):
    path = EXAMPLE.parent / "sequences.py"
    options = ["--epochs", "1", "--width", "8", "--test-size", "5", "--output", str(tmp_path)]
    module = runpy.run_path(str(path))
    x, mask = torch.zeros(3, 14, 56), torch.arange(14) < torch.tensor([[14], [9], [5]])
    x[0, 13], x[1, 8], x[2, 4] = 1.0, 1.0, 1.0
    dmm = module["DeepMarkovModel"](2, 4)
    assert torch.equal(dmm.read_backwards(x, mask)[1, 8], dmm.read_backwards(x[1:2, :9], mask[1:2, :9])[0, 8])
    assert (module["load"]("test")["mask"].sum(1) >= 5).all()

    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert "log p(x)" in capsys.readouterr().out
    assert (tmp_path / "continued.png").exists()


def test_two_stochastic_layers(monkeypatch, tmp_path, capsys):
    path = EXAMPLE.parent / "two_stochastic_layers.py"
    options = [
        "--epochs",
        "1",
        "--estimators",
        "IWAE",
        "--batch-size",
        "250",
        "--test-size",
        "9",
        "--draws",
        "9",
    ]
    monkeypatch.setattr("sys.argv", [str(path), *options, "--output", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    assert "IWAE, 5 particles" in capsys.readouterr().out
    assert (tmp_path / "samples_IWAE.png").stat().st_size > 1000
