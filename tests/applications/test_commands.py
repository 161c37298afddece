"""`pyro-vae train`, `evaluate`, `embed`, `anomalies` and `impute`, in this process on tiny data."""

import csv
import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.__main__ import main
from pyro_vae.applications.commands import build_parser
from pyro_vae.applications.commands.choices import choose
from pyro_vae.applications.commands.data import Data
from pyro_vae.applications.commands.tables import read_table, write_columns
from pyro_vae.applications.units import StandardisedGuide, StandardisedLikelihood

NAMES = ["height", "mass", "age", "year"]
QUICK = ["--epochs", "2", "--hidden", "6", "--latent-dim", "2", "--quiet"]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def values(count=40):
    random = np.random.default_rng(0)
    z = random.normal(size=(count, 2))
    x = z @ random.normal(size=(2, 4)) + 0.3 * random.normal(size=(count, 4))
    return x * [0.1, 1000.0, 10.0, 1.0] + [1.7, 7e4, 40.0, 2015.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table with a header and a text column, one with holes, and models of both."""
    path = tmp_path_factory.mktemp("commands")
    x = values()
    write(path / "x.csv", [*NAMES, "kind"], [[*row, "a"] for row in x.tolist()])
    holes = np.where(np.random.default_rng(1).random(x.shape) < 0.2, np.nan, x)
    rows = [["" if np.isnan(value) else value for value in row] for row in holes.tolist()]
    write(path / "holes.csv", NAMES, rows)
    with torch.random.fork_rng():
        assert run("train", path / "x.csv", "--drop", "kind", "--out", path / "vae.pt", *QUICK) == 0
        options = ["--missing", "nan", "--out", path / "holes.pt", *QUICK]
        assert run("train", path / "holes.csv", *options) == 0
    return path


def test_a_model_of_a_table_is_one_of_the_library_in_the_units_of_the_table(folder):
    code = f"import pyro_vae as pv; print(type(pv.VAE.load({str(folder / 'vae.pt')!r}).likelihood).__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "StandardisedLikelihood\n"
    vae = pv.VAE.load(folder / "vae.pt")
    x = torch.tensor(values())
    centre = (vae.reconstruct(x) - x.mean(0)) / x.std(0)
    assert centre.abs().max() < 5
    # the density is that of x: the one of u, by the scale of each column
    z = torch.randn(3, 40, 2, dtype=torch.float64)
    u = (x - x.mean(0)) / x.std(0, correction=0)
    inner = vae.likelihood.likelihood(z).log_prob(u) - x.std(0, correction=0).log().sum()
    torch.testing.assert_close(vae.decode(z).log_prob(x), inner, rtol=1e-9, atol=1e-7)


def test_a_model_is_written_once_with_the_columns_of_its_table(tmp_path, monkeypatch):
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: written.append(1) or save(*arguments))
    write(tmp_path / "x.csv", NAMES, values().tolist())
    assert run("train", tmp_path / "x.csv", "--out", tmp_path / "vae.pt", *QUICK) == 0
    assert len(written) == 1
    vae, frame = pv.VAE.load(tmp_path / "vae.pt"), pd.read_csv(tmp_path / "x.csv")
    assert vae.encode(frame).batch_shape == (40,)
    with pytest.raises(ValueError, match="training was on the columns"):
        vae.encode(frame[NAMES[::-1]])


@pytest.mark.parametrize("name", ["Normal", "StudentT"])
def test_units_take_context_free_parts_and_missing_values(name, double):
    inner = getattr(pv.likelihoods, name)(2, (3,), hidden_features=(4,))
    guide = pv.guides.DiagonalNormal((3,), 2, hidden_features=(4,), mask_input=True)
    offset, scale = [5.0, -2.0, 0.0], [2.0, 0.1, 1.0]
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=StandardisedLikelihood(inner, offset, scale),
        guide=StandardisedGuide(guide, offset, scale),
    ).double()
    x = torch.randn(5, 3) * torch.tensor(scale) + torch.tensor(offset)
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[0, 1] = False
    u = (x - torch.tensor(offset)) / torch.tensor(scale)
    expected = guide(torch.where(observed, u, 0.0), observed=observed).mean
    assert torch.equal(vae.encode(x, observed=observed).mean, expected)
    assert vae.decode(torch.zeros(5, 2)).event_shape == (3,)
    with pytest.raises(ValueError, match="one number, or one per element"):
        StandardisedGuide(guide, [1.0, 2.0], scale)
    with pytest.raises(ValueError, match="must be positive"):
        StandardisedGuide(guide, offset, [1.0, 0.0, 1.0])


def test_evaluate_embed_and_columns_by_name(folder, tmp_path, capsys):
    model = ["--model", folder / "vae.pt", "--quiet"]
    assert (
        run("evaluate", folder / "x.csv", *model, "--num-particles", "30", "--json", tmp_path / "r.json") == 0
    )
    report = pv.evaluate(
        pv.VAE.load(folder / "vae.pt"), torch.tensor(values()), num_particles=30, progress=False
    )
    assert capsys.readouterr().out.strip() == str(report)
    assert json.loads((tmp_path / "r.json").read_text())["elbo"][0] == pytest.approx(report.elbo)
    # other order, another column between: the same rows to the model
    shuffled = [[row[3], "b", row[1], row[0], row[2]] for row in values().tolist()]
    write(tmp_path / "y.csv", ["year", "note", "mass", "height", "age"], shuffled)
    assert run("embed", folder / "x.csv", tmp_path / "z.npy", *model) == 0
    assert run("embed", tmp_path / "y.csv", tmp_path / "z.csv", *model) == 0
    z = np.load(tmp_path / "z.npy")
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "z.csv", delimiter=",", skiprows=1), z)
    assert (tmp_path / "z.csv").read_text().startswith("z0,z1\n")
    expected = pv.VAE.load(folder / "vae.pt").encode(torch.tensor(values())).mean
    np.testing.assert_array_equal(z, expected.detach().numpy())


def test_validation_data_are_taken_by_column_and_a_vamp_prior_in_units(folder, tmp_path):
    shuffled = [[row[3], "b", row[1], row[0], row[2]] for row in values()[:9].tolist()]
    write(tmp_path / "y.csv", ["year", "note", "mass", "height", "age"], shuffled)
    out = ["--out", tmp_path / "vae.pt", "--json", tmp_path / "t.json", "--prior", "vamp"]
    options = ["--drop", "kind", "--validation", tmp_path / "y.csv", *QUICK]
    assert run("train", folder / "x.csv", *out, *options) == 0
    history = json.loads((tmp_path / "t.json").read_text())["history"]["validation_elbo"]
    assert all(elbo > -100 for elbo in history)  # years as heights would be hopeless
    assert pv.VAE.load(tmp_path / "vae.pt").prior.pseudo_inputs.abs().max() < 5


def test_anomalies(folder, tmp_path, capsys):
    odd = values(30)
    odd[7, 0] += 30
    write(tmp_path / "today.csv", NAMES, odd.tolist())
    arguments = [tmp_path / "today.csv", tmp_path / "found.csv", "--model", folder / "vae.pt"]
    options = ["--reference", folder / "x.csv", "--contamination", "0.1", "--num-particles", "5"]
    assert run("anomalies", *arguments, *options, "--json", tmp_path / "a.json") == 0
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "line", "score", "p_value", "anomaly"]
    assert len(rows) == 30
    assert (rows[7]["row"], rows[7]["line"]) == ("7", "9")  # line 1 is the header
    assert rows[7]["anomaly"] == "1"
    assert float(rows[7]["p_value"]) == min(float(row["p_value"]) for row in rows)
    pd.DataFrame(odd, columns=NAMES).to_parquet(tmp_path / "today.parquet")
    assert run("anomalies", tmp_path / "today.parquet", tmp_path / "same.csv", *arguments[2:], *options) == 0
    with (tmp_path / "same.csv").open() as file:
        assert list(csv.DictReader(file)) == [{k: row[k] for k in row if k != "line"} for row in rows]
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["anomalies"] == sum(row["anomaly"] == "1" for row in rows)
    assert all((float(row["score"]) < found["threshold"]) == (row["anomaly"] == "1") for row in rows)


def test_impute_keeps_what_is_there(folder, tmp_path):
    options = ["--model", folder / "holes.pt", "--num-particles", "40", "--quiet"]
    assert run("impute", folder / "holes.csv", tmp_path / "filled.csv", *options) == 0
    before = [line.split(",") for line in (folder / "holes.csv").read_text().splitlines()]
    after = [line.split(",") for line in (tmp_path / "filled.csv").read_text().splitlines()]
    assert len(after) == len(before)
    changed = 0
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert a == b or (a == "" and np.isfinite(float(b)))
            changed += a == ""
    assert changed > 0
    table = read_table(folder / "holes.csv")
    holes = np.stack([table.numbers(column) for column in range(4)], 1)
    for suffix, save in (
        (".npy", np.save),
        (".npz", lambda path, x: np.savez(path, x=x, other=np.arange(3))),
    ):
        path, out = tmp_path / f"holes{suffix}", tmp_path / f"filled{suffix}"
        save(path, holes)
        assert run("impute", path, out, *options) == 0
        found = np.load(out) if suffix == ".npy" else np.load(out)["x"]
        np.testing.assert_array_equal(found[~np.isnan(holes)], holes[~np.isnan(holes)])
        text = read_table(tmp_path / "filled.csv")
        np.testing.assert_array_equal(found, np.stack([text.numbers(column) for column in range(4)], 1))
    assert np.load(tmp_path / "filled.npz")["other"].tolist() == [0, 1, 2]


def test_images_are_binarised_and_parts_may_be_chosen(tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", grey)
    options = ["--prior", "vamp", "--guide", "full", "--estimator", "iwae", "--particles", "3", *QUICK]
    out = ["--out", tmp_path / "vae.pt", "--json", tmp_path / "t.json"]
    assert run("train", tmp_path / "x.npy", *out, *options) == 0
    told = json.loads((tmp_path / "t.json").read_text())
    assert (told["likelihood"], told["binarize"], told["epochs"]) == ("bernoulli", "dynamic", 2)
    assert "likelihood bernoulli, binarised (dynamic)" in capsys.readouterr().err
    model = ["--model", tmp_path / "vae.pt", "--quiet"]
    assert run("evaluate", tmp_path / "x.npy", *model, "--num-particles", "3") == 0
    assert "bits per dimension" in capsys.readouterr().out
    assert run("embed", tmp_path / "x.npy", tmp_path / "z.csv", *model) == 0
    reference = ["--reference", tmp_path / "x.npy", "--contamination", "0.1", "--score", "elbo"]
    assert run("anomalies", tmp_path / "x.npy", tmp_path / "a.csv", *model, *reference) == 0
    assert run("impute", tmp_path / "x.npy", tmp_path / "i.npy", *model) == 1
    assert "holds bytes, of which none is missing" in capsys.readouterr().err


def test_a_run_resumes(folder, tmp_path):
    options = ["--drop", "kind", "--quiet", "--hidden", "6", "--latent-dim", "2"]
    run_in = ["--checkpoint-dir", tmp_path / "run"]

    def train(name, epochs, *more):
        out = ["--out", tmp_path / name, "--epochs", epochs]
        assert run("train", folder / "x.csv", *options, *out, *more) == 0
        return pv.VAE.load(tmp_path / name).state_dict()

    whole = train("whole.pt", 3)
    train("part.pt", 2, *run_in)
    resumed = train("resumed.pt", 3, *run_in, "--resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_likelihood_is_chosen_by_the_values():
    random = np.random.default_rng(0)

    def chosen(x, grey=False):
        return choose(Data("x", x, grey=grey), "auto", None)

    real, unit = random.normal(size=(50, 3)), random.random((50, 3))
    assert chosen(real).likelihood == "normal"
    assert chosen(unit).likelihood == "normal"  # a table
    assert chosen(unit, grey=True)[::2] == ("bernoulli", "dynamic")
    assert chosen(np.where(unit < 0.1, np.nan, unit), grey=True).likelihood == "continuous-bernoulli"
    bits = np.where(unit < 0.1, np.nan, unit > 0.5)
    assert chosen(bits, grey=True)[::2] == ("bernoulli", None)
    assert chosen(random.poisson(2.0, (50, 3)).astype(float)).likelihood == "poisson"
    counts = random.negative_binomial(1, 0.1, (200, 3)).astype(float)
    assert chosen(counts).likelihood == "negative-binomial"
    assert chosen(2000 + random.poisson(5.0, (50, 3)).astype(float)).likelihood == "normal"  # years
    assert choose(Data("x", unit, grey=True), "continuous-bernoulli", None).binarize is None
    colours = pv.data.from_array(random.random((4, 3, 2, 2)))
    assert choose(Data("x", colours, grey=True), "auto", None).likelihood == "discretized-logistic"


@pytest.mark.parametrize("likelihood", ["poisson", "negative-binomial", "student-t"])
def test_counts_and_heavy_tails_train(tmp_path, likelihood):
    counts = np.random.default_rng(0).poisson(50.0, (30, 3))
    np.save(tmp_path / "x.npy", counts)
    out = ["--out", tmp_path / "vae.pt", "--likelihood", likelihood]
    assert run("train", tmp_path / "x.npy", *out, *QUICK) == 0
    vae = pv.VAE.load(tmp_path / "vae.pt")
    rate = vae.decode(torch.zeros(1, 2, dtype=torch.float64)).mean
    assert ((rate > 30) & (rate < 70)).all()


def test_tables(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("\ufeffa;b;c\r\n1;NA;x\r\n2.5;3;y\r\n".encode())  # as a spreadsheet writes it
    table = read_table(path)
    assert table.names == ["a", "b", "c"]
    assert table.select(None, ["c"]) == [0, 1]
    np.testing.assert_array_equal(table.numbers(1), [np.nan, 3])
    with pytest.raises(ValueError, match=r"line 2, column 'c' of .* is 'x', which is not a number"):
        table.numbers(2)
    table.write_filled(tmp_path / "y.csv", [0, 1], np.array([[9.0, 0.1], [9.0, 9.0]]))
    assert (tmp_path / "y.csv").read_bytes() == b"a;b;c\r\n1;0.1;x\r\n2.5;3;y\r\n"
    path.write_text("1,2\n3,4\n")
    assert (read_table(path).names, len(read_table(path))) == (None, 2)
    path.write_text("0,1\n3,4\n")  # the names that data frames give
    assert read_table(path).names == ["0", "1"]
    path.write_text(",a\n0,4\n")
    assert read_table(path).select(None, []) == [1]  # without the index


def test_parquet(tmp_path, folder):
    frame = pd.DataFrame({"a": [1.0, np.nan], "b": pd.array([1, None], "Int64"), "c": ["x", "y"]})
    frame.to_parquet(tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(table.numbers(1), [1, np.nan])
    assert table.place(1, 0) == f"row 1 (counted from 0), column 'a' of {tmp_path / 'x.parquet'}"
    with pytest.raises(ValueError, match="column 'c'"):
        table.numbers(2)
    table.write_filled(tmp_path / "y.parquet", [0, 1], np.array([[9.0, 9.0], [0.5, 1.5]]))
    found = pd.read_parquet(tmp_path / "y.parquet")
    assert found.values.tolist() == [[1.0, 1.0, "x"], [0.5, 1.5, "y"]]
    write_columns(tmp_path / "z.parquet", {"z0": np.arange(3.0)})
    assert pd.read_parquet(tmp_path / "z.parquet")["z0"].tolist() == [0, 1, 2]


def test_what_parquet_needs_is_said(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ["embed", folder / "x.csv", tmp_path / "z.parquet", "--model", folder / "vae.pt"]
    assert run(*arguments) == 1
    assert "pip install pandas pyarrow" in capsys.readouterr().err


def test_a_cell_without_a_number_is_named_by_its_line_and_each_remedy_works(folder, tmp_path, capsys):
    lines = [",".join(map(str, row)) for row in (NAMES, *values().tolist())]
    cells = lines[5].split(",")
    lines[5] = ",".join([*cells[:2], "oops", *cells[3:]])
    bad, empty = tmp_path / "bad.csv", tmp_path / "empty.csv"
    bad.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    empty.write_text(bad.read_text().replace("oops", ""))
    model, holes = ["--model", folder / "vae.pt"], ["--model", folder / "holes.pt"]
    out, drop = tmp_path / "out.csv", "or leave the column out, by --drop 'age'"
    train = ["--out", tmp_path / "vae.pt", *QUICK]
    cases = {
        f"leave the cell empty and add --missing nan, {drop}": [
            ["train", bad, *train], ["evaluate", bad, *model],
        ],
        f"write numbers, leave the cell empty, {drop}": [
            ["train", bad, *train, "--missing", "nan"], ["evaluate", bad, *holes],
            ["impute", bad, out, *model],
        ],
        f"write numbers, {drop}": [["anomalies", bad, out, *model, "--reference", bad]],
    }  # fmt: skip
    for message, commands in cases.items():
        for arguments in commands:
            assert run(*arguments) == 1
            start = f"pyro-vae: line 7, column 'age' of {bad} is 'oops', which is not a number: "
            error = capsys.readouterr().err
            assert error.startswith(start), error
            assert message in error
    assert run("train", bad, *train, "--drop", "age") == 0
    assert run("train", empty, *train, "--missing", "nan") == 0
    assert run("evaluate", empty, *model, "--missing", "nan", "--num-particles", 5, "--quiet") == 0
    assert run("evaluate", empty, *holes, "--num-particles", 5, "--quiet") == 0
    assert run("impute", empty, out, *model) == 0


def test_invalid_data_are_one_sentence_and_leave_no_file(folder, tmp_path, capsys):
    model, out = ["--model", folder / "vae.pt"], tmp_path / "out.csv"
    train = ["--out", tmp_path / "vae.pt", *QUICK]
    table = [folder / "x.csv", "--drop", "kind"]
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "infinite.csv").write_text("a,b\n1,inf\n")
    write(tmp_path / "other.csv", NAMES[:2], values()[:, :2].tolist())
    (tmp_path / "wide.csv").write_text("1,2\n3,4\n")
    np.savez(tmp_path / "two.npz", a=np.ones((3, 2)), b=np.ones((3, 2)))
    whole = (tmp_path / "two.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    before = sorted(tmp_path.iterdir())
    cases = {
        "there is no file": ["train", tmp_path / "none.csv", *train],
        "did you mean 'digits'": ["train", "digts", *train],
        "column 'kind' of": ["train", folder / "x.csv", *train],
        "has no column 'size'; it has height": ["train", folder / "x.csv", "--drop", "size", *train],
        "is missing: pass --missing nan": ["train", folder / "holes.csv", *train],
        "line 3 of": ["train", tmp_path / "ragged.csv", *train],
        "is empty": ["train", tmp_path / "empty.csv", *train],
        "two columns 'a'": ["train", tmp_path / "twice.csv", *train],
        "line 2, column 'b' of": ["train", tmp_path / "infinite.csv", *train],
        "--array NAME": ["train", tmp_path / "two.npz", *train],
        "cut.npz is not a .npz file of numbers": ["train", tmp_path / "cut.npz", *train],
        "objects.npy is not a .npy file of numbers": ["train", tmp_path / "objects.npy", *train],
        "there is no folder": ["train", *table, "--out", tmp_path / "no" / "v.pt"],
        "--resume continues": ["train", *table, "--resume", *train],
        "--particles goes with": ["train", *table, "--particles", 2, *train],
        "outside the support": ["train", *table, "--likelihood", "bernoulli", *train],
        "has no column 'age'": ["evaluate", tmp_path / "other.csv", *model],
        "has 2 columns; the model": ["embed", tmp_path / "wide.csv", out, *model],
        "no readable checkpoint": ["evaluate", folder / "x.csv", "--model", folder / "x.csv"],
        "no checkpoint at": ["evaluate", folder / "x.csv", "--model", folder / "none.pt"],
        "pass --missing nan if": ["evaluate", folder / "holes.csv", *model],
        "must end in .npy": ["embed", folder / "x.csv", tmp_path / "z.txt", *model],
        "must end in .csv": ["impute", folder / "holes.csv", tmp_path / "z.npy", *model],
        "fill them by pyro-vae impute": [
            "anomalies", folder / "holes.csv", out, *model, "--reference", folder / "holes.csv",
        ],
        "cannot hold a false-alarm rate": [
            "anomalies", table[0], out, *model, "--reference", table[0], "--contamination", 0.01,
        ],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert run(*arguments) == 1, message
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("pyro-vae: ")
        assert message in error[-1]
        assert not any(line.startswith("pyro-vae: ") for line in error[:-1])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "x.csv"],
        ["train", "x.csv", "--out", "v.pt", "--epochs", "0"],
        ["train", "x.csv", "--out", "v.pt", "--likelihood", "gauss"],
        ["anomalies", "x.csv", "y.csv", "--model", "v.pt", "--reference", "z.csv", "--contamination", "2"],
        ["embed", "x.csv", "y.csv", "--model", "v.pt", "--device", "abacus"],
        ["impute", "x.csv", "y.csv", "--model", "v.pt", "--split", "test"],
    ],
)
def test_wrong_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: pyro-vae" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "embed", "anomalies", "impute", "compress", "decompress", "list"]
)
def test_help_has_an_example_and_a_line_for_each_argument(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert f"pyro-vae {command} " in shown.partition("example:")[2]
    commands = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    assert not [action.dest for action in commands.choices[command]._actions if not action.help]


def test_the_list_of_commands_has_one_line_for_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.partition("COMMAND\n")[2].splitlines()[:8]
    assert [line.split()[0] for line in lines][-3:] == ["compress", "decompress", "list"]
    assert all(len(line.split()) > 1 for line in lines)


def test_version_names_what_a_report_of_a_fault_needs(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "place", ["pyro_vae.applications.commands.train.fit", "pyro_vae.training.run.Run.finish_epoch"]
)
def test_interruption_is_130_and_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr(place, lambda *args, **options: signal.raise_signal(signal.SIGINT))
    options = ["--drop", "kind", "--out", tmp_path / "vae.pt", "--checkpoint-dir", tmp_path / "run", *QUICK]
    assert run("train", folder / "x.csv", *options) == 130
    saved = (tmp_path / "run" / "last.pt").exists()
    how = f"; the run is saved in {tmp_path / 'run'}: --resume continues it" if saved else ""
    assert capsys.readouterr().err.endswith(f"pyro-vae: interrupted{how}\n")
    assert saved == place.endswith("finish_epoch")
    assert not (tmp_path / "vae.pt").exists()
