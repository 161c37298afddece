"""The examples run with their options, and report invalid options in one line."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist_svi.py"
FILES = {"best.pt", "elbo.png", "history.csv", "last.pt", "latent.png", "metrics.json", "reconstructions.png"}


pytestmark = pytest.mark.usefixtures("few_digits")


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
