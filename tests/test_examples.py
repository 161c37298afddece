"""The main example runs under its options, and answers a mistake in one line."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist_svi.py"
FILES = {"best.pt", "elbo.png", "history.csv", "last.pt", "latent.png", "metrics.json", "reconstructions.png"}


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
        ("--likelihood", "normal", "--conv", "--beta", "0.5", "--free-bits", "0.1", "--batch-size", "1000"),
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
def test_the_example_leaves_model_numbers_and_pictures(monkeypatch, tmp_path, capsys, options):
    run(monkeypatch, tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} >= FILES | {"samples.png", "vae.pt"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"test ELBO {metrics['test_elbo']:.2f} ± {metrics['test_elbo_se']:.2f} nats per image" in printed
    is_discrete = metrics["settings"]["likelihood"] in ("bernoulli", "discretized-logistic")
    assert (metrics["bits_per_dimension"] is not None) == is_discrete
    if is_discrete:
        assert metrics["bits_per_dimension"] == pytest.approx(-metrics["test_elbo"] / 784 / np.log(2))


def test_the_example_resumes(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path)
    run(monkeypatch, tmp_path, "--epochs", "2", "--resume")
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2"]


def test_the_example_takes_pictures_of_ones_own(monkeypatch, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (50, 3, 6, 8), dtype=np.uint8))
    run(monkeypatch, tmp_path / "out", "--dataset", str(tmp_path / "mine.npy"), "--batch-size", "10")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "mnits"), "mnist"),
        (("--device", "tpu"), "--device tpu cannot be used here"),
        (("--estimator", "vimco"), "num_particles must be at least 2"),
        (("--binarize", "none"), r"outside the support of Bernoulli.*binarize="),
        (("--conv", "--hidden", "30"), "--hidden goes without --conv"),
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
