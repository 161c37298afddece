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
    data = ("--dataset", "digits", "--images", "20", "--annealed")
    few = (*data, "2", "--particles", "3")
    run(monkeypatch, tmp_path / "few", str(tmp_path / "flow.pt"), *few, file="judge.py")
    written = {path.name for path in (tmp_path / "few").iterdir()}
    assert written == {"report.json", "draws.nc", "latent.png"}  # neither k̂ nor a KL by dimension
    assert "annealed" in capsys.readouterr().out

    train(monkeypatch, tmp_path)
    many = (*data, "0", "--particles", "40")
    run(monkeypatch, tmp_path / "out", str(tmp_path / "vae.pt"), *many, file="judge.py")
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


# ---- recipes, each with few epochs: what is printed, what is drawn


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("anomalies.py --epochs 1", "false alarms at 5 %"),
        ("compress.py --epochs 1 --images 9 --particles 2", "VAE .* bits per pixel"),
        ("conditional_vae.py --epochs 1 --width 10 --test-size 20", "error of p\\(y\\|x\\)"),
        ("denoise.py --epochs 1", "denoise .* mean squared error"),
        ("semi_supervised.py --epochs 1 --epochs-features 1 --latent-dim 3", "semi-supervised  error"),
        ("two_stochastic_layers.py --epochs 1 --particles 2", r"IWAE\(2\) .* ± .* ± "),
    ],
)
def test_a_recipe_prints_and_draws(monkeypatch, tmp_path, capsys, command, printed):
    file, *options = command.split()
    run(monkeypatch, tmp_path, *options, file=file)
    said = capsys.readouterr().out
    assert re.search(printed, said)
    [*figures] = re.findall(r"figure in (.+)", said)
    assert len(figures) == (file != "compress.py")
    assert all(Path(figure).stat().st_size > 1000 for figure in figures)


def test_each_guide_is_compared_on_the_same_digits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["custom_guide.py", "--epochs", "1"])
    runpy.run_path(str(EXAMPLES / "custom_guide.py"), run_name="__main__")
    rows = capsys.readouterr().out.split("gained\n")[1].splitlines()
    assert [row[:3] for row in rows] == ["the", "(a)", "(b)", "(c)"]
    assert all(row.count(" ± ") == 2 for row in rows)


def test_the_gaps_of_both_guides_are_those_of_theory(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, file="linear_gaussian.py")
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row[:4] in ("diag", "full")]
    gaps = {name: (float(gap), float(theory)) for name, gap, theory in rows}
    for gap, theory in gaps.values():
        assert theory <= gap < theory + 0.05  # no guide of the family has a smaller gap
    assert gaps["diagonal"][1] > 0.5
    assert (tmp_path / "gap.png").exists()


def test_missing_values_are_imputed_better_than_by_means(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["missing.py", "--epochs", "2"])
    runpy.run_path(str(EXAMPLES / "missing.py"), run_name="__main__")
    error, of_means = re.findall(r"(?:error|means) (\d\.\d+)", capsys.readouterr().out)[-2:]
    assert float(error) < float(of_means)


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
