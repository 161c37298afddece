"""The examples run with their options, and report invalid options in one line."""

import json
import re
import runpy
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("few_digits")

FILES = {"best.pt", "elbo.png", "history.csv", "last.pt", "metrics.json"}
FILES |= {"reconstructions.png", "samples.png"}


def run(monkeypatch, folder, *options, file="mnist_svi.py"):
    monkeypatch.setattr("sys.argv", [str(EXAMPLES / file), *options, "--output", str(folder)])
    runpy.run_path(str(EXAMPLES / file), run_name="__main__")


def train(monkeypatch, folder, *options):
    small = ("--dataset", "digits", "--epochs", "1", "--hidden", "20")
    run(monkeypatch, folder, *small, *options)


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ((), {"latent.png"}),
        (("--latent-dim", "2", "--hidden", "20", "9"), {"latent.png", "manifold.png"}),
        (("--latent-dim", "1", "--batch-size", "250"), set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_start_writes_model_metrics_and_figures(monkeypatch, tmp_path, capsys, options, figures):
    train(monkeypatch, tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"vae.pt"} | figures
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"test ELBO {metrics['test_elbo']:.2f} ± {metrics['test_elbo_se']:.2f} nats" in printed
    assert "Ctrl-C is safe" in printed
    assert "a minute or two" in printed


def test_the_start_shows_the_model_and_guide_that_it_trains():
    build = runpy.run_path(str(EXAMPLES / "mnist_svi.py"))["build"]
    vae = build(3, (1, 4, 5), [6])
    parts = {"prior": vae.prior, "likelihood": vae.likelihood, "posterior": vae.posterior}
    shown = dict(parts, pyro=pyro)
    exec(textwrap.dedent(build.__doc__.partition("distributions.")[2]), shown)
    x = (torch.rand(7, 1, 4, 5) < 0.5).float()
    losses = []
    for model, guide in ((vae.model, vae.guide), (shown["model"], shown["guide"])):
        torch.manual_seed(1)
        losses.append(TraceMeanField_ELBO().loss(model, guide, x))
    assert losses[0] == losses[1]


class SeenError(ValueError):
    """Raised with the images that an example hands on."""


def test_judge_evaluates_the_test_images_of_training(monkeypatch, tmp_path):
    def hand_on(*args, validation=None, **options):
        raise SeenError(args[1] if validation is None else validation)

    def seen(file, *options):
        monkeypatch.setattr("sys.argv", [str(EXAMPLES / file), *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / file), run_name="__main__")
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


def test_judge_writes_report_figures_and_draws(monkeypatch, tmp_path, capsys):
    parts = {"guide": pv.guides.Flow((1, 28, 28), 2, hidden_features=(3,))}
    likelihood = pv.likelihoods.Bernoulli(2, (1, 28, 28), hidden_features=(3,))
    pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, **parts).save(tmp_path / "flow.pt")
    data = ("--dataset", "digits", "--images", "20", "--annealed", "2")
    run(monkeypatch, tmp_path / "few", str(tmp_path / "flow.pt"), *data, "--particles", "3", file="judge.py")
    written = {path.name for path in (tmp_path / "few").iterdir()}
    assert written == {"report.json", "draws.nc", "latent.png"}  # neither k̂ nor a KL by dimension
    assert "annealed" in capsys.readouterr().out

    train(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path / "out", str(tmp_path / "vae.pt"), *data, "--particles", "40", file="judge.py")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "draws.nc", "latent.png", "pareto_k.png", "kl_per_dimension.png"}


def test_the_start_resumes(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path)
    first = (tmp_path / "history.csv").read_text()
    train(monkeypatch, tmp_path, "--epochs", "2", "--resume")
    both = (tmp_path / "history.csv").read_text()
    assert both.startswith(first)  # with its seconds: the first epoch was not taken again
    assert [row.split(",")[0] for row in both.splitlines()[1:]] == ["1", "2"]


def test_the_start_accepts_user_images(monkeypatch, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (50, 3, 6, 8), dtype=np.uint8))
    train(monkeypatch, tmp_path / "out", "--dataset", str(tmp_path / "mine.npy"), "--batch-size", "10")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "mnits"), "mnist"),
        (("--device", "tpu"), "error: .*tpu"),
        (("--latent-dim", "0"), "latent_dim must be at least 1"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (("--prior", "flow"), "unrecognized arguments: --prior flow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_start_answers_a_mistake_in_a_sentence(monkeypatch, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, tmp_path / "out", *options)
    said = capsys.readouterr().err + str(stop.value)
    assert re.search(message, said)
    assert "Traceback" not in said


def test_conditional_vae(monkeypatch, tmp_path, capsys):
    path = EXAMPLES / "conditional_vae.py"
    options = ["--epochs", "1", "--width", "10", "--test-size", "20", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert "error of p(y|x)" in capsys.readouterr().out
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_semi_supervised(monkeypatch, tmp_path, capsys):
    path = EXAMPLES / "semi_supervised.py"
    options = ["--epochs", "1", "--epochs-features", "1", "--latent-dim", "3", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert "semi-supervised  error" in capsys.readouterr().out
    assert (tmp_path / "samples.png").exists()


def test_sequences(monkeypatch, tmp_path, capsys):
    path = EXAMPLES / "sequences.py"
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
    path = EXAMPLES / "two_stochastic_layers.py"
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
