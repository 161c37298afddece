"""`python -m pyro_vae compress`, `decompress` and `list`."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.__main__ import main


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Bernoulli(3, (1, 4, 5), hidden_features=(8,)),
        guide=pv.guides.DiagonalNormal((1, 4, 5), 3, hidden_features=(7,)),
    )
    vae.save(tmp_path / "vae.pt")
    pv.applications.Codec(vae, particles=2).save(tmp_path / "model.codec")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2, (23, 4, 5), dtype=np.uint8))
    return tmp_path


@pytest.mark.parametrize("model", ["vae.pt", "model.codec"])
def test_an_array_comes_back(folder, capsys, model):
    paths = {name: str(folder / name) for name in ("x.npy", "x.pvz", "y.npy")}
    options = ["--model", str(folder / model), "--quiet"]
    assert main(["compress", paths["x.npy"], paths["x.pvz"], *options]) == 0
    assert main(["decompress", paths["x.pvz"], paths["y.npy"], *options]) == 0
    assert (folder / "x.npy").read_bytes() == (folder / "y.npy").read_bytes()
    capsys.readouterr()
    assert main(["list", paths["x.pvz"]]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "file",
        "rows",
        "chunks",
        "raw",
        "bytes",
        "bits/dim",
        "ratio",
        "weights",
        "check",
    ]
    assert line.split()[1:3] == ["23", "1"]
    assert line.endswith("CRC-32 ok")


def test_networks_without_an_exact_form_in_float64(folder, capsys):
    vae = pv.VAE.load(folder / "vae.pt")
    vae.with_guide(pv.guides.SemiAmortised(vae.posterior, num_steps=2)).save(folder / "refined.pt")
    paths = {name: str(folder / name) for name in ("x.npy", "x.pvz", "y.npy")}
    options = ["--model", str(folder / "refined.pt"), "--quiet"]
    assert main(["compress", paths["x.npy"], paths["x.pvz"], *options]) == 1
    assert 'take precision="float64"' in capsys.readouterr().err
    precision = ["--precision", "float64"]
    assert main(["compress", paths["x.npy"], paths["x.pvz"], *options, *precision]) == 0
    assert main(["decompress", paths["x.pvz"], paths["y.npy"], *options, *precision]) == 0
    assert (folder / "x.npy").read_bytes() == (folder / "y.npy").read_bytes()
    plain = ["--model", str(folder / "vae.pt"), "--quiet"]
    assert main(["decompress", paths["x.pvz"], paths["y.npy"], *plain]) == 1
    assert "this codec has 'exact': take the precision of the file" in capsys.readouterr().err


def test_errors_are_one_line_and_leave_no_file(folder, capsys):
    options = ["--model", str(folder / "vae.pt"), "--quiet"]
    np.save(folder / "grey.npy", np.full((2, 4, 5), 0.5))
    np.save(folder / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.savez(folder / "two.npz", a=np.ones(3), b=np.ones(3))
    (folder / "empty.npy").write_bytes(b"")

    def compress(name, output="out"):
        return ["compress", str(folder / name), str(folder / output), *options]

    cases = {
        "objects.npy is not a .npy file of numbers": compress("objects.npy"),
        "empty.npy is not a .npy file of numbers": compress("empty.npy"),
        "two.npz holds the arrays a, b: save one of them": compress("two.npz"),
        "absent for out: make it first": compress("x.npy", "absent/out"),
        "absent for y: make it first": ["decompress", "x", str(folder / "absent" / "y"), *options],
        "cannot be coded exactly": ["compress", str(folder / "grey.npy"), str(folder / "out"), *options],
        "does not begin with": ["decompress", str(folder / "x.npy"), str(folder / "out"), *options],
        "magic": ["list", str(folder / "x.npy")],
        "No such file": ["compress", str(folder / "none.npy"), str(folder / "out"), *options],
        "no checkpoint": ["list", "x"],
    }
    cases["no checkpoint"] = ["compress", str(folder / "x.npy"), str(folder / "out"), "--model", "none.pt"]
    before = sorted(folder.iterdir())
    for message, arguments in cases.items():
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_the_shape_must_fit(folder, capsys):
    np.save(folder / "wide.npy", np.zeros((2, 7)))
    assert (
        main(["compress", str(folder / "wide.npy"), str(folder / "out"), "--model", str(folder / "vae.pt")])
        == 1
    )
    assert "the model takes (N, 1, 4, 5)" in capsys.readouterr().err
