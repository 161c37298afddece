"""Codecs of any network in float64: the same bits in every process of a machine, and refused elsewhere."""

import io
import os
import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.applications.codec import Codec, CodecError
from pyro_vae.applications.codec.errors import (
    MachineMismatchError,
    ModelMismatchError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from pyro_vae.applications.codec.machine import machine
from pyro_vae.networks import positive

EVENT, K = (2, 5), 3
FAMILIES = ("Bernoulli", "DiscretizedLogistic", "BetaBinomial", "Poisson", "NegativeBinomial")


class Gated(nn.Module):
    """A network that has no exact form."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 9), nn.LayerNorm(9), nn.Sigmoid())
        self.last = nn.Linear(9, outputs)
        self.power = 1.0

    def forward(self, inputs):
        hidden = self.layers(inputs)
        return 2 * self.last(hidden * hidden.cos().exp() ** self.power)


class OwnGuide(nn.Module):
    def __init__(self, spoil=lambda loc: loc):
        super().__init__()
        self.network, self.spoil = Gated(10, 2 * K), spoil

    def forward(self, x):
        loc, raw = self.network(x).split(K, -1)
        return dist.Normal(self.spoil(loc), positive(raw - 1)).to_event(1)


GUIDES = {
    "own": OwnGuide,
    "DiagonalNormal": lambda: pv.guides.DiagonalNormal(EVENT, K, hidden_features=(7,)),
    "mask_input": lambda: pv.guides.DiagonalNormal(EVENT, K, hidden_features=(7,), mask_input=True),
    "SemiAmortised": lambda: pv.guides.SemiAmortised(
        pv.guides.DiagonalNormal(EVENT, K, hidden_features=(7,)), num_steps=2
    ),
}


def make(family="Bernoulli", guide="own", prior="LearnedNormal"):
    torch.manual_seed(0)
    likelihood = getattr(pv.likelihoods, family)
    network = Gated(K, likelihood.num_parameters * 10)
    return pv.VAE(
        prior=getattr(pv.priors, prior)(K),
        likelihood=likelihood(K, EVENT, network=network),
        guide=GUIDES[guide]() if isinstance(guide, str) else guide,
    )


def draws(vae, rows, seed=1):
    torch.manual_seed(seed)
    return vae.sample(rows).clamp(max=255)


@pytest.mark.parametrize(
    ("family", "guide"),
    [
        *((family, "own") for family in FAMILIES),
        *(("DiscretizedLogistic", guide) for guide in list(GUIDES)[1:]),
    ],
)
def test_data_come_back_and_nothing_else_changes(family, guide):
    vae = make(family, guide)
    x = draws(vae, 7)
    before = [p.clone() for p in vae.parameters()]
    state = torch.get_rng_state()
    codec = Codec(vae, precision="float64", lanes=2, particles=1 if guide == "SemiAmortised" else 2)
    blob = codec.compress(x)
    assert torch.equal(codec.decompress(blob), x)
    assert codec.compress(x) == blob
    again = Codec(vae, precision="float64", particles=codec.particles)
    assert again.fingerprint == codec.fingerprint
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.dtype == torch.float32 for p in vae.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, vae.parameters(), strict=True))


def test_the_rate_is_that_of_the_elbo_and_of_the_exact_codec():
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (6, 7), hidden_features=(8,)),
        guide=pv.guides.DiagonalNormal((6, 7), K, hidden_features=(7,)),
    )
    x = draws(vae, 60)
    rates = {name: Codec(vae, precision=name, lanes=1).rate(x) for name in ("exact", "float64")}
    assert rates["float64"].net.value == pytest.approx(rates["exact"].net.value, rel=0.01)
    overhead = rates["float64"].overhead
    assert abs(overhead.value) < 5 * overhead.standard_error + 0.002 * rates["float64"].net.value


def test_networks_see_one_row_on_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads, rows = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    vae = make(guide=OwnGuide(lambda loc: rows.append((len(loc), *threads)) or loc))
    Codec(vae, precision="float64")
    assert rows == [(1, 1)] * 3
    assert threads[:2] == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_vae_rounded(family):
    vae = make(family, prior="StandardNormal").double()
    x = draws(vae, 4)
    model = Codec(vae, precision="float64").model
    symbols = (x * (255 if family == "DiscretizedLogistic" else 1)).round().flatten(1).numpy()
    loc, scale = model.posterior(symbols.astype(np.uint8))
    q = vae.encode(x).base_dist
    assert np.abs(loc / 2**12 - q.loc.detach().numpy()).max() <= 2**-13
    assert np.abs(scale / 2**20 - q.scale.detach().numpy()).max() <= 2**-21
    z = torch.tensor([[0.25, -1.5, 3.0], [0.0, 7.0, -0.125]]).double()
    outputs = torch.stack(vae.likelihood.outputs(z), 1).flatten(2).detach().numpy()
    assert np.abs(model.outputs((z * 2**12).long().numpy()) / 2**12 - outputs).max() <= 2**-13


def test_other_rows_change_no_bit():
    model = Codec(make(guide=OwnGuide(lambda loc: loc * len(loc))), precision="float64").model
    symbols = np.random.default_rng(0).integers(0, 2, (13, 10)).astype(np.uint8)
    z = np.random.default_rng(1).integers(-9000, 9000, (13, K))
    whole = [*model.posterior(symbols), model.outputs(z)]
    for size in (1, 5):
        parts = [
            [*model.posterior(symbols[start : start + size]), model.outputs(z[start : start + size])]
            for start in range(0, 13, size)
        ]
        for found, expected in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
            assert (found == expected).all()


READ = (
    "import sys, torch, pyro_vae as pv; torch.set_num_threads(int(sys.argv[3]))\n"
    "codec = pv.applications.Codec(pv.VAE.load(sys.argv[1]), precision='float64')\n"
    "x = codec.decompress(open(sys.argv[2], 'rb').read()); print(codec.compress(x).hex())"
)


def in_another_process(tmp_path, threads, **settings):
    paths = [str(tmp_path / "vae.pt"), str(tmp_path / "x.pvz")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **settings}
    command = [sys.executable, "-c", READ, *paths, str(threads)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_another_process_reads_the_file_and_another_kind_of_machine_does_not(tmp_path):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT, hidden_features=(300,), activation="gelu"),
        guide=pv.guides.SemiAmortised(
            pv.guides.DiagonalNormal(EVENT, K, hidden_features=(250,)), num_steps=2
        ),
    )
    blob = Codec(vae, precision="float64").compress(draws(vae, 5))
    vae.save(tmp_path / "vae.pt")
    (tmp_path / "x.pvz").write_bytes(blob)
    found = in_another_process(tmp_path, 2)
    assert found.stdout.strip() == blob.hex(), found.stderr
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no other kernels")
    refused = in_another_process(tmp_path, 1, ATEN_CPU_CAPABILITY="default")
    assert "MachineMismatchError" in refused.stderr
    assert f"machine: file {machine()}, codec " in refused.stderr


def test_the_outputs_themselves_identify_machine_and_code():
    vae = make()
    x = draws(vae, 5)
    blob = Codec(vae, precision="float64").compress(x)
    vae.likelihood.network.power = 1 + 2**-50
    with pytest.raises(MachineMismatchError, match=r"these differ: probe: file [0-9a-f]{12}, codec"):
        Codec(vae, precision="float64").decompress(blob)
    vae.likelihood.network.power = 1.0
    assert torch.equal(Codec(vae, precision="float64").decompress(blob), x)
    with torch.no_grad():
        vae.likelihood.network.last.bias[0] += 1
    with pytest.raises(ModelMismatchError, match=r"differ: weights: .*; probe: ") as caught:
        Codec(vae, precision="float64").decompress(blob)
    assert type(caught.value) is ModelMismatchError


def test_the_precision_of_a_file_is_named():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT, hidden_features=(8,)),
        guide=GUIDES["DiagonalNormal"](),
    )
    x, codecs = draws(vae, 4), {name: Codec(vae, precision=name) for name in ("exact", "float64")}
    for own, other in (("exact", "float64"), ("float64", "exact")):
        with pytest.raises(ModelMismatchError, match=f"precision '{other}', this codec has '{own}'"):
            codecs[own].decompress(codecs[other].compress(x))


def test_networks_that_change_from_call_to_call_are_refused_before_anything_is_written():
    generator = np.random.default_rng(0)  # which no seed of torch reaches
    vae = make(guide=OwnGuide(lambda loc: loc + generator.normal()))
    file = io.BytesIO()
    with (
        pytest.raises(UnsupportedModelError, match="other numbers when they are called again"),
        Codec(vae, precision="float64").writer(file, rows_per_chunk=4) as writer,
    ):
        writer.write(draws(vae, 4))
    assert b"CH" not in file.getvalue()


def test_random_networks_that_torch_seeds_are_reproducible():
    vae = make(guide=OwnGuide(lambda loc: loc + torch.randn_like(loc)))
    x, codec = draws(vae, 4), Codec(vae, precision="float64")
    assert torch.equal(codec.decompress(codec.compress(x)), x)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda: OwnGuide(lambda loc: loc / 0), "the guide gives numbers that are not finite"),
        (
            lambda: pv.guides.FullCovarianceNormal(EVENT, K, hidden_features=(4,)),
            "the guide must be one of independent normals",
        ),
        (
            lambda: pv.guides.Mixture(EVENT, K, hidden_features=(4,)),
            "the guide must be one of independent normals",
        ),
    ],
    ids=["infinite", "FullCovarianceNormal", "Mixture"],
)
def test_other_guides_are_refused(guide, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Codec(make(guide=guide()), precision="float64")


def test_numbers_that_are_not_finite_for_some_rows_are_named():
    vae = make(guide=OwnGuide())
    codec = Codec(vae, precision="float64")
    codec.model.vae.posterior.spoil = lambda loc: loc.where(loc < loc.max(), torch.nan)
    with pytest.raises(UnsupportedModelError, match="the guide gives numbers that are not finite"):
        codec.compress(draws(vae, 4))


def test_guides_without_an_exact_form_name_the_other_precision():
    for guide in ("own", "mask_input", "SemiAmortised"):
        with pytest.raises(UnsupportedModelError, match='precision="float64"'):
            Codec(make(guide=guide))


def test_a_codec_in_float64_is_kept_as_its_vae(tmp_path):
    vae = make(guide="DiagonalNormal")
    with pytest.raises(CodecError, match=r"vae.save\(path\)"):
        Codec(vae, precision="float64").save(tmp_path / "codec")
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_of_the_header_and_every_truncation_is_refused():
    vae = make()
    codec = Codec(vae, precision="float64")
    blob = codec.compress(draws(vae, 2))
    for place in range(blob.index(b"CH")):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(blob)
            damaged[place] ^= flip
            with pytest.raises(CodecError):
                codec.decompress(bytes(damaged))
    for length in range(len(blob)):
        with pytest.raises(CodecError):
            codec.decompress(blob[:length])
    with pytest.raises(UnsupportedVersionError, match="flags 2"):
        codec.decompress(blob[:9] + b"\x02" + blob[10:])


@pytest.mark.slow
def test_refining_q_for_each_example_lowers_the_rate():
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(8),
        likelihood=pv.likelihoods.Bernoulli(8, (1, 28, 28), hidden_features=(100,)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 8, hidden_features=(100,)),
    )
    train = pv.data.load("digits", split="train", binarize="threshold")
    pv.fit(vae, train, epochs=10, batch_size=100, seed=0, progress=False)
    x = pv.data.load("digits", split="test", binarize="threshold")[:200]
    refined = vae.with_guide(
        pv.guides.SemiAmortised(vae.posterior, num_steps=20, step_size=0.1, num_particles=8)
    )
    nets = {}
    for name, each in (("plain", vae), ("refined", refined)):
        codec = Codec(each, precision="float64", lanes=1)
        rate = codec.rate(x, num_particles=1)
        assert rate.overhead is None or name == "plain"
        nets[name] = rate.net.value
    assert nets["refined"] < 0.99 * nets["plain"]
