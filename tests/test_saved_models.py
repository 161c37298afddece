"""Files saved by earlier code: what they record of each class, and one that must still load."""

import base64
import inspect
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.comparison.experiment import peak_memory
from pyro_vae.networks import MLP
from pyro_vae.utils.serialization import _BoundedAllocation, rebuild, spec

SAVED = Path(__file__).parent / "helpers" / "saved_flow_vae.txt"  # base64 of a file of `VAE.save`

OPTIONS = {"hidden_features": [4], "activation": "tanh"}
GUIDE = {"event_shape": [5], "latent_dim": 2}
LIKELIHOOD = {"latent_dim": 2, "event_shape": [5]}
FLOW = {"flow": "nsf", "num_transforms": 1, "flow_features": [4]}


def network(in_features, out_features):
    arguments = {"in_features": in_features, "out_features": out_features, "hidden_features": []}
    return MLP(**arguments), {"class": "networks.MLP", "arguments": arguments}


def described(call, arguments, **modules):
    """A class or function, its arguments, and what is stored of those that are modules."""
    given = arguments | {name: module for name, (module, _) in modules.items()}
    return call, given, arguments | {name: description for name, (_, description) in modules.items()}


RECORDS = [
    described(guides.DiagonalNormal, GUIDE | OPTIONS),
    described(guides.DiagonalNormal, GUIDE, network=network(5, 4)),
    described(guides.FullCovarianceNormal, GUIDE | OPTIONS),
    described(guides.LowRankNormal, GUIDE),
    described(guides.LowRankNormal, GUIDE | OPTIONS | {"rank": 1}),
    described(guides.LowRankNormal, GUIDE, network=network(5, 8)),
    described(guides.Mixture, GUIDE | OPTIONS | {"num_components": 3}),
    described(guides.Mixture, GUIDE | {"network": None}),
    described(guides.Flow, GUIDE | OPTIONS | FLOW | {"num_context": 3}),
    described(guides.Flow, GUIDE | {"num_context": 3}, network=network(5, 7)),
    described(
        guides.SemiAmortised,
        {"num_steps": 3, "step_size": 0.1, "end_to_end": False},
        guide=(
            guides.LowRankNormal(**GUIDE, **OPTIONS),
            {"class": "guides.LowRankNormal", "arguments": GUIDE | OPTIONS},
        ),
    ),
    described(likelihoods.Bernoulli, LIKELIHOOD | OPTIONS),
    described(likelihoods.ContinuousBernoulli, LIKELIHOOD | OPTIONS),
    described(likelihoods.DiscretizedLogistic, LIKELIHOOD, network=network(2, 10)),
    described(likelihoods.BetaBinomial, LIKELIHOOD | OPTIONS | {"total_count": 9}),
    described(likelihoods.BetaBinomial, LIKELIHOOD, network=network(2, 10)),
    described(likelihoods.Poisson, LIKELIHOOD),
    described(likelihoods.Normal, LIKELIHOOD | OPTIONS | {"variance": 0.5}),
    described(likelihoods.Normal, LIKELIHOOD | {"variance": "shared"}, network=network(2, 5)),
    described(likelihoods.NegativeBinomial, LIKELIHOOD | OPTIONS | {"network": None}),
    described(likelihoods.NegativeBinomial, LIKELIHOOD, network=network(2, 5)),
    described(likelihoods.StudentT, LIKELIHOOD | OPTIONS | {"min_scale": 0.1}),
    described(
        likelihoods.Columns,
        {"latent_dim": 2, "columns": ["normal", ["ordinal", 3]], "offset": [1.5, 0.0], "scale": [2.0, 1.0]}
        | {"names": ["a", "b"], "min_scale": 0.1}
        | OPTIONS,
    ),
    described(likelihoods.Columns, {"latent_dim": 2, "columns": ["poisson"]}, network=network(2, 1)),
    described(priors.StandardNormal, {"latent_dim": 2}),
    described(priors.LearnedNormal, {"latent_dim": 2}),
    described(priors.Mixture, {"latent_dim": 2, "num_components": 3}),
    described(
        priors.VampPrior,
        {"num_components": 3},
        guide=(guides.Mixture(**GUIDE, **OPTIONS), {"class": "guides.Mixture", "arguments": GUIDE | OPTIONS}),
    ),
    described(priors.Flow, {"latent_dim": 2} | FLOW),
    described(networks.MLP, {"in_features": 5, "out_features": 2} | OPTIONS),
    described(
        networks.ColumnEncoder,
        {"columns": ["binary", ["categorical", 3]], "out_features": 2, "offset": [0.0, 0.0]} | OPTIONS,
    ),
    described(networks.ConvEncoder, {"event_shape": [1, 8, 8], "out_features": 3, "channels": [2]}),
    described(networks.ConvDecoder, {"in_features": 3, "out_shape": [1, 8, 8], "activation": "elu"}),
]


@pytest.mark.parametrize(("cls", "given", "stored"), RECORDS)
def test_the_record_of_a_class_is_its_arguments(cls, given, stored):
    """As tuples or lists, by keyword or by position: the constructor's arguments and no defaults."""
    name = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
    module = cls(**given)
    assert spec(module) == {"class": name, "arguments": stored}
    assert spec(rebuild(spec(module))) == spec(module)
    parameters = inspect.signature(cls).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    assert spec(cls(*[tuples.pop(key) for key in positional], **tuples)) == spec(module)


def test_every_class_has_a_record():
    rooms = (guides, likelihoods, priors, networks)
    public = {getattr(room, name) for room in rooms for name in room.__all__}
    modules = {c for c in public if inspect.isclass(c) and issubclass(c, torch.nn.Module)}
    assert {cls for cls, _, _ in RECORDS} == modules - {guides.Guide, likelihoods.Likelihood}


def test_a_file_of_earlier_code_loads_with_the_same_numbers(tmp_path):
    (tmp_path / "vae.pt").write_bytes(base64.b64decode(SAVED.read_text()))
    vae = pv.VAE.load(tmp_path / "vae.pt")
    mean = vae.decode(torch.tensor([[0.3, -0.2], [0.0, 0.5], [1.0, -1.0]])).mean
    expected_mean = [
        [-0.55432659, -0.17382821, -0.05553505, 0.57084465, -0.55325550],
        [-0.47521257, -0.19179520, -0.02900258, 0.65031797, -0.54454035],
        [-0.51692647, -0.15297483, 0.06987070, 0.48118910, -0.45650673],
    ]
    torch.testing.assert_close(mean, torch.tensor(expected_mean), rtol=0, atol=1e-6)
    q = vae.encode(torch.linspace(-1, 1, 15).reshape(3, 5))
    torch.manual_seed(1)
    expected_draw = [
        [0.47061729, -0.36387974],
        [0.38642764, -0.53246546],
        [0.33806109, -1.28189683],
    ]
    torch.testing.assert_close(q.rsample(), torch.tensor(expected_draw), rtol=0, atol=1e-6)


# A file costs what it holds ---------------------------------------------------------------------------------


def small_vae():
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (5,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((5,), 2, hidden_features=(4,)),
    )


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("guide", {"hidden_features": [20_000, 20_000, 20_000]}),
        ("guide", {"hidden_features": [3000] * 200}),
        ("guide", {"latent_dim": 10**9}),
        ("likelihood", {"event_shape": [10**5, 10**5]}),
        ("prior", {"latent_dim": 10**10}),
    ],
)
def test_a_small_file_that_describes_a_large_model_is_refused_at_once(tmp_path, part, arguments):
    small_vae().save(tmp_path / "vae.pt")
    stored = torch.load(tmp_path / "vae.pt", weights_only=True)
    stored["content"]["spec"]["arguments"][part]["arguments"].update(arguments)
    torch.save(stored, tmp_path / "vae.pt")

    def load():
        with pytest.raises(pv.CheckpointError):
            pv.VAE.load(tmp_path / "vae.pt")

    assert peak_memory(load) < 2**26


def test_a_flow_of_a_billion_transforms_is_refused(tmp_path):
    vae = small_vae().with_guide(pv.guides.Flow((5,), 2, num_context=3, hidden_features=(4,)))
    vae.save(tmp_path / "vae.pt")
    stored = torch.load(tmp_path / "vae.pt", weights_only=True)
    stored["content"]["spec"]["arguments"]["guide"]["arguments"]["num_transforms"] = 10**9
    torch.save(stored, tmp_path / "vae.pt")
    with pytest.raises(pv.CheckpointError, match="larger than its tensors"):
        pv.VAE.load(tmp_path / "vae.pt")


def test_a_slice_to_the_end_is_no_large_range():
    """Its end is 2⁶³ − 1, and torch 2.8 dispatches such slices as a flow is built."""
    with _BoundedAllocation({"weight": torch.zeros(5)}):
        rest = torch.ops.aten.slice(torch.arange(7), 0, 4, sys.maxsize)
        with pytest.raises(ValueError, match="larger than its tensors"):
            torch.arange(10**9)
    assert rest.tolist() == [4, 5, 6]


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    small_vae().save(tmp_path / "vae.pt")
    with zipfile.ZipFile(tmp_path / "vae.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{name.split('/')[0]}/data/999", bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(pv.CheckpointError, match="not written by this library"):
        pv.VAE.load(tmp_path / "b.pt")
