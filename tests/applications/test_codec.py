"""Files decode to the data, at the rate of the ELBO; damaged files and foreign ones are refused."""

import base64
import io
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.applications.codec import Codec, bits_back, coder
from pyro_vae.applications.codec.errors import (
    CodecError,
    CorruptFileError,
    ModelMismatchError,
    NotACodecFileError,
    TruncatedFileError,
    UnsupportedVersionError,
)
from pyro_vae.applications.codec.file import FileReader

EVENT, K = (2, 5), 3
GOLDEN = Path(__file__).parent / "golden_codec.txt"
FAMILIES = ("Bernoulli", "DiscretizedLogistic", "BetaBinomial", "Poisson", "NegativeBinomial")


def make(family="Bernoulli", *, prior="StandardNormal", seed=0, event=EVENT, network=None, guide=None):
    torch.manual_seed(seed)
    vae = pv.VAE(
        prior=getattr(pv.priors, prior)(K),
        likelihood=getattr(pv.likelihoods, family)(K, event, hidden_features=(8,), network=network),
        guide=pv.guides.DiagonalNormal(event, K, hidden_features=(7,), network=guide),
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2)
    return vae


def draws(vae, rows, seed=1):
    """Data that the model may have produced, so that few rows are dearer than raw."""
    torch.manual_seed(seed)
    return vae.sample(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", ["StandardNormal", "LearnedNormal"])
@pytest.mark.parametrize(("lanes", "particles"), [(None, 1), (4, 1), (3, 5)])
def test_data_come_back(family, prior, lanes, particles):
    vae = make(family, prior=prior)
    codec = Codec(vae, lanes=lanes, particles=particles)
    for rows in (1, 2, 23):
        x = draws(vae, rows)
        blob = codec.compress(x)
        assert torch.equal(codec.decompress(blob), x)
        assert codec.compress(x) == blob


@pytest.mark.parametrize("family", ["Bernoulli", "DiscretizedLogistic"])
def test_convolutional_networks(family):
    event = (1, 9, 7)
    outputs = (1 + (family == "DiscretizedLogistic"), 9, 7)
    vae = make(
        family,
        event=event,
        network=pv.networks.ConvDecoder(K, outputs, channels=(3, 2)),
        guide=pv.networks.ConvEncoder(event, 2 * K, channels=(2, 3)),
    )
    x, codec = draws(vae, 11), Codec(vae, lanes=2)
    assert torch.equal(codec.decompress(codec.compress(x)), x)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_constant_and_noisy_images_are_stored_at_most_raw(value):
    codec = Codec(make("DiscretizedLogistic"))
    noise = torch.randint(0, 256, (37, *EVENT), dtype=torch.uint8)
    for x in (torch.full_like(noise, value), noise):
        blob = codec.compress(x)
        assert torch.equal(codec.decompress(blob), x)
        assert len(blob) < x.numel() + 4 * len(x) + 150


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_types_come_back(dtype):
    for family in ("Bernoulli", "DiscretizedLogistic"):
        vae = make(family)
        codec = Codec(vae)
        x = draws(vae, 5)
        if family == "DiscretizedLogistic":
            x = (x * 255).round()
            if dtype == "bool":
                continue
        x = x.to(getattr(torch, dtype))
        if family == "DiscretizedLogistic" and x.is_floating_point():
            x = x / 255
        back = codec.decompress(codec.compress(x))
        assert back.dtype == x.dtype
        assert torch.equal(back, x)


def test_the_rate_is_that_of_the_elbo():
    vae = make(event=(6, 7))
    x = draws(vae, 700)
    for particles in (1, 6):
        rate = Codec(vae, particles=particles, lanes=1).rate(x, num_particles=64)
        assert rate.total.value == pytest.approx(rate.net.value + rate.initial + rate.header)
        assert rate.num_bytes * 8 == pytest.approx(rate.total.value * x.numel())
        assert 0 < rate.initial * x.numel() < 40 * K * particles
        assert rate.header * x.numel() < 8 * 120
        if particles == 1:
            assert abs(rate.overhead.value) < 5 * rate.overhead.standard_error + 0.002 * rate.net.value
            assert abs(rate.net.value - rate.minus_elbo.value) < 5 * rate.net.standard_error
            plain = rate.net.value
    assert rate.net.value < plain
    assert "700 rows" in str(rate)
    assert rate.overhead is None


def test_the_overhead_of_integers_is_below_a_thousandth_of_a_nat():
    vae = make(event=(6, 7)).double()
    x = draws(vae, 50).double()
    exact = Codec(vae, lattice_bits=8).model
    z = torch.randint(0, 256, (50, K)).numpy()
    tables = exact.likelihood_tables(z)
    found = exact.tables.log_probability(tables, x.flatten(1).numpy()) / 2**30
    position = torch.from_numpy(exact.lattice.points[z] / 4096)
    assert np.abs(found - vae.decode(position).log_prob(x).detach().numpy()).max() < 0.02
    assert abs((found - vae.decode(position).log_prob(x).detach().numpy()).mean()) < 1e-3 * 5


def with_posterior(vae, loc, raw_scale):
    """Make q(z|x) the same for every x."""
    with torch.no_grad():
        last = vae.posterior.network[-1]
        last.weight.zero_()
        last.bias.copy_(torch.cat([torch.as_tensor(loc).expand(K), torch.full((K,), raw_scale)]))
    return vae


@pytest.mark.parametrize("prior", ["StandardNormal", "LearnedNormal"])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("loc", [-1e8, -40.0, 0.0, 7.0, 4e8])
@pytest.mark.parametrize("raw_scale", [-1e8, -30.0, 100.0, 4e8])
def test_posteriors_outside_the_lattice_narrower_than_a_bin_or_wide(prior, particles, loc, raw_scale):
    vae = with_posterior(make(event=(11, 12), prior=prior), loc, raw_scale)
    if prior == "LearnedNormal":
        with torch.no_grad():
            vae.prior.loc.copy_(torch.tensor([4000.0, -1.0, 0.0]))
            vae.prior.raw_scale.copy_(torch.tensor([-40.0, 0.0, 4000.0]))
    x = draws(make(event=(11, 12)), 5)
    codec = Codec(vae, particles=particles, lanes=2)
    with np.errstate(all="raise"):
        assert torch.equal(codec.decompress(codec.compress(x)), x)


@pytest.mark.parametrize(
    ("loc", "raw_scale", "positions"),
    [
        (7.0, -30.0, {255}),
        (-1e8, 3.0, {0}),
        (torch.tensor([7.0, 0.01, -7.0]), -30.0, {0, 128, 255}),
        (0.0, 4e8, {0, 255}),
    ],
)
def test_a_posterior_outside_the_lattice_costs_what_the_prior_asks_of_its_ends(loc, raw_scale, positions):
    vae = make(event=(40, 30))
    with torch.no_grad():
        vae.likelihood.network[-1].weight.zero_()
        vae.likelihood.network[-1].bias.fill_(-4.0)
    x = torch.zeros(7, 40, 30)
    codec = Codec(with_posterior(vae, loc, raw_scale), lanes=1)
    encoded = bits_back.encode(codec.model, x.flatten(1).byte().numpy(), lanes=1, particles=1)
    assert set(encoded.latents.flatten().tolist()) == positions
    assert not len(encoded.raw)
    assert torch.equal(codec.decompress(codec.compress(x)), x)
    pixels = 1200 * np.log2(1 + np.exp(-4.0))
    of_prior = -np.log2((codec.model.prior_tables[0][encoded.latents] + 1) / 2**24).sum(1)
    of_posterior = K if raw_scale > 10 else 0  # a wide q falls on either end with probability 1/2
    assert encoded.bits == pytest.approx(pixels + of_prior - of_posterior, abs=0.01)


def test_streams_of_chunks_and_seek(tmp_path):
    vae = make()
    x, codec = draws(vae, 50), Codec(vae, lanes=2)
    path = tmp_path / "x.pvz"
    with codec.writer(path, rows_per_chunk=16) as writer:
        for part in x.split(7):
            writer.write(part)
        assert not path.exists()
    reader = codec.reader(path)
    assert (reader.rows, reader.chunks, reader.shape, reader.dtype) == (50, 4, EVENT, "float32")
    assert torch.equal(torch.cat(list(reader)), x)
    with codec.reader(path) as reader:
        reader.seek(2)
        assert torch.equal(next(reader), x[32:48])
        reader.seek(0)
        assert torch.equal(next(reader), x[:16])
        with pytest.raises(ValueError, match="from 0 to 4"):
            reader.seek(5)
    for rows in (15, 16, 17):
        file = io.BytesIO()
        with codec.writer(file, rows_per_chunk=16) as writer:
            writer.write(x[:rows])
        assert torch.equal(codec.decompress(file.getvalue()), x[:rows])


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    vae = make()
    x, path = draws(vae, 20), tmp_path / "x.pvz"
    path.write_bytes(b"earlier")
    writer = Codec(vae).writer(path, rows_per_chunk=8)

    def interrupted():
        with writer:
            writer.write(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(CodecError, match="no rows"), Codec(vae).writer(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x.pvz"]
    assert path.read_bytes() == b"earlier"


def test_a_saved_codec_decodes_without_the_vae_and_in_another_process(tmp_path):
    vae = make("NegativeBinomial", prior="LearnedNormal")
    x, codec = draws(vae, 9), Codec(vae, max_count=200, particles=2)
    codec.save(tmp_path / "model.codec")
    (tmp_path / "x.pvz").write_bytes(codec.compress(x))
    loaded = Codec.load(tmp_path / "model.codec")
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.compress(x) == codec.compress(x)
    assert loaded.rate(x).minus_elbo is None
    code = (
        "import torch, sys; from pyro_vae.applications.codec import Codec; torch.set_num_threads(2)\n"
        "rows = torch.cat(list(Codec.load(sys.argv[1]).reader(sys.argv[2]))); torch.save(rows, sys.argv[3])"
    )
    paths = [str(tmp_path / name) for name in ("model.codec", "x.pvz", "x.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env={"OMP_NUM_THREADS": "2"})
    assert torch.equal(torch.load(tmp_path / "x.pt"), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_codecs_of_every_family_read_each_others_files(family, tmp_path):
    vae = make(family)
    x, codec = draws(vae, 5), Codec(vae)
    codec.save(tmp_path / "codec")
    loaded = Codec.load(tmp_path / "codec")
    assert torch.equal(loaded.decompress(codec.compress(x)), x)
    assert loaded.model.digests == codec.model.digests


def small_file():
    vae = make()
    x = draws(vae, 6)
    codec = Codec(vae, lanes=2)
    file = io.BytesIO()
    with codec.writer(file, rows_per_chunk=4) as writer:
        writer.write(x)
    return codec, file.getvalue()


def test_every_flipped_byte_and_every_truncation_is_refused():
    codec, blob = small_file()
    for place in range(len(blob)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(blob)
            damaged[place] ^= flip
            with pytest.raises(CodecError):
                codec.decompress(bytes(damaged))
    for length in range(len(blob)):
        with pytest.raises((TruncatedFileError, NotACodecFileError, CorruptFileError)):
            codec.decompress(blob[:length])
    for extra in (b"\0", b"\n", blob):
        with pytest.raises(CodecError):
            codec.decompress(blob + extra)


def test_foreign_files_and_versions_are_refused():
    codec, blob = small_file()
    for foreign in (b"", b"x", b"\x89PNG\r\n\x1a\n" + bytes(90), blob.replace(b"\r\n", b"\n")):
        with pytest.raises(NotACodecFileError):
            codec.decompress(foreign)
    with pytest.raises(UnsupportedVersionError, match="version 3"):
        codec.decompress(blob[:8] + b"\x03" + blob[9:])


def seal(content):
    return content + struct.pack("<I", zlib.crc32(content))


def test_valid_check_sums_do_not_help_a_forged_file():
    codec, blob = small_file()
    reader = FileReader(io.BytesIO(blob))
    first = reader._offsets[0]
    header = blob[:first]

    def forged(content, rows):
        index = struct.pack("<QI", len(content), rows)
        end = struct.pack("<II4s", 1, zlib.crc32(index + struct.pack("<I", 1)), b"PVZ\n")
        return header + content + index + end

    empty = struct.pack("<2sHII", b"CH", 1, 0, 0) + struct.pack("<II", 0, 0)
    chunks = {
        "no words": (seal(empty), 4),
        "10¹² rows": (seal(empty), 2**32 - 1),
        "deep seed": (seal(empty[:-8] + struct.pack("<II", 2**32 - 1, 0)), 4),
        "many words": (seal(empty[:-8] + struct.pack("<II", 0, 2**32 - 1)), 4),
        "many lanes": (seal(struct.pack("<2sHII", b"CH", 2**16 - 1, 0, 0)), 2**16),
        "many raw rows": (seal(struct.pack("<2sHII", b"CH", 1, 2**32 - 1, 0)), 4),
        "random words": (seal(empty[:-4] + struct.pack("<I", 50) + np.random.default_rng(0).bytes(200)), 4),
        "short": (seal(b""), 4),
    }
    for content, rows in chunks.values():
        with pytest.raises(CorruptFileError):
            codec.decompress(forged(content, rows))
    count = struct.pack("<II4s", 2**32 - 1, 0, b"PVZ\n")
    with pytest.raises(CorruptFileError, match="announces 4,294,967,295 chunks"):
        codec.decompress(header + count)


def test_another_model_is_named():
    blob = small_file()[1]
    vae = make()
    with torch.no_grad():
        vae.likelihood.network[1].weight[0, 0] += 2**-11
    with pytest.raises(ModelMismatchError, match="differ: weights: file [0-9a-f]{12}, codec [0-9a-f]{12}. U"):
        Codec(vae, lanes=2).decompress(blob)
    cases = [
        ({"lattice_bits": 7}, "settings"),
        ({"support": 5.0}, "settings"),
        ({"particles": 2}, "particles"),
    ]
    for options, name in cases:
        with pytest.raises(ModelMismatchError, match=f"differ: {name}: file"):
            Codec(make(), **options).decompress(blob)
    with pytest.raises(ModelMismatchError, match="structure"):
        Codec(make("Poisson")).decompress(blob)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, torch.nan, torch.inf])
def test_data_outside_the_support_are_named(value):
    x = torch.zeros(4, *EVENT)
    x[2, 1, 3] = value
    with pytest.raises(CodecError, match=r"x\[2, 1, 3\] = .*expected whole numbers from 0 to 1; 1 of 40"):
        Codec(make()).compress(x)


def test_grey_levels_must_be_exact_and_counts_small():
    x = torch.zeros(4, *EVENT)
    x[1, 0, 0] = 0.5
    with pytest.raises(CodecError, match=r"x\[1, 0, 0\] = 0.5 .*grey levels k / 255"):
        Codec(make("DiscretizedLogistic")).compress(x)
    x[1, 0, 0] = 256
    with pytest.raises(CodecError, match=r"from 0 to 255 \(max_count= sets the largest\)"):
        Codec(make("Poisson")).compress(x)
    codec = Codec(make("Poisson"), max_count=256)
    assert torch.equal(codec.decompress(codec.compress(x)), x)


def test_arguments_are_checked():
    codec = Codec(make())
    with pytest.raises(ValueError, match=r"must have shape \(N, 2, 5\).*reshape"):
        codec.compress(torch.zeros(4, 10))
    with pytest.raises(CodecError, match="no rows"):
        codec.compress(torch.zeros(0, *EVENT))
    with pytest.raises(TypeError, match="got list"):
        codec.compress([[0.0]])
    with pytest.raises(TypeError, match=r"x.float\(\)"):
        codec.compress(torch.zeros(1, *EVENT).bfloat16())
    with pytest.raises(ValueError, match="'exact' or 'float64'; got 'float32'"):
        Codec(make(), precision="float32")
    with pytest.raises(ValueError, match="7 to 9"):
        Codec(make(), lattice_bits=15)
    with pytest.raises(ValueError, match="support"):
        Codec(make(), support=float("nan"))
    with pytest.raises(TypeError, match=r"pyro_vae\.VAE"):
        Codec(nn.Linear(2, 3))
    writer = codec.writer(io.BytesIO())
    writer.write(torch.zeros(1, *EVENT))
    with pytest.raises(TypeError, match="one type"):
        writer.write(torch.zeros(1, *EVENT).double())
    images = pv.data.load("digits", split="test", binarize="dynamic")
    with pytest.raises(ValueError, match="fixed"):
        codec.writer(io.BytesIO()).write(images)


def test_a_coder_that_rounds_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(coder, "TOTAL", 2**24 - 4)
    with pytest.raises(CodecError, match=r"constriction>=0\.4,<0\.6"):
        coder._require_known_answer(__import__("constriction").stream)


def test_a_missing_coder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    coder._constriction.cache_clear()
    with pytest.raises(ImportError, match=r"pyro_vae\[codec\]"):
        coder.Stack(0, 9)
    monkeypatch.undo()


def test_a_panic_of_the_coder_is_an_ordinary_error():
    stream = __import__("constriction").stream
    gaussian, zeros = stream.model.QuantizedGaussian(-9, 9), np.zeros(1)
    with pytest.raises(CorruptFileError, match="refuses its input"), coder._ordinary_errors():
        stream.stack.AnsCoder().encode_reverse(np.zeros(1, np.int32), gaussian, zeros, zeros)  # scale 0


def test_long_runs_take_more_of_the_seed(monkeypatch):
    depths = []
    stack = coder.Stack
    monkeypatch.setattr(bits_back, "Stack", lambda lane, depth: depths.append(depth) or stack(lane, depth))
    vae = make(event=(1,))
    with torch.no_grad():
        vae.likelihood.network[-1].weight.zero_()
        vae.likelihood.network[-1].bias.fill_(-30.0)
        vae.posterior.network[-1].weight.zero_()
        vae.posterior.network[-1].bias.copy_(torch.tensor([0.0] * K + [0.5413] * K))  # q = p, nearly
    model = Codec(vae).model
    symbols = np.zeros((3000, 1), np.uint8)
    encoded = bits_back.encode(model, symbols, lanes=1, particles=1)
    monkeypatch.undo()
    assert (bits_back.decode(model, 3000, encoded.lanes, encoded.raw, particles=1) == symbols).all()


def test_draws_do_not_depend_on_the_example_before():
    """A posterior a little wider than the prior is drawn from as it is; it does not run away, row by row."""
    vae = make(guide=nn.Sequential(nn.Flatten(), nn.Linear(10, 2 * K)), network=nn.Linear(K, 10))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        vae.posterior.network[1].bias[K:] = math.log(math.expm1(1.1))  # q = N(0, 1.1²)
    rows = 3000
    codec = Codec(vae, lanes=1)
    symbols = draws(vae, rows).flatten(1).numpy().astype(np.uint8)
    encoded = bits_back.encode(codec.model, symbols, lanes=1, particles=1)
    u = codec.model.lattice.points[encoded.latents] / 4096
    assert not len(encoded.raw)
    assert abs(u.mean(0)).max() < 5 * 1.1 / rows**0.5
    assert abs(u.var(0) - 1.21).max() < 5 * 1.21 * (2 / rows) ** 0.5
    for lag in (1, 2):
        assert abs((u[lag:] * u[:-lag]).mean(0)).max() < 5 * 1.21 / rows**0.5


def golden():
    """A codec whose weights depend on no generator."""
    vae = make(guide=nn.Sequential(nn.Flatten(), nn.Linear(10, 6)), network=nn.Linear(K, 10))
    with torch.no_grad():
        for number, parameter in enumerate(vae.parameters()):
            steps = torch.arange(parameter.numel()).view_as(parameter)
            parameter.copy_((((steps + number) * 37) % 101 - 50) / 32)
    x = (torch.arange(19 * 10).view(19, *EVENT) * 7 % 11 < 5).float()
    return Codec(vae, lanes=2), x


def test_the_golden_file_decodes_for_ever():
    codec, x = golden()
    blob = base64.b64decode(GOLDEN.read_text())
    assert torch.equal(codec.decompress(blob), x)
    assert codec.compress(x) == blob
