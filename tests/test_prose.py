"""The prose of the package, and the skeletons of CONTRIBUTING.md."""

import re
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae
from pyro_vae import VAE, guides, likelihoods, objectives, priors

PACKAGE = Path(pyro_vae.__file__).parent
ROOT = PACKAGE.parent
BANNED = [
    r"(?<!there )is no (?!more|less|longer|larger|closed)",
    r"(?<!there )are no (?!more|less|longer|larger)",
    r"one a\b",
    "afresh",
    "anew",
    "is told",
    "told of",
    "comes? to be",
    "of your own",
    "as ever",
    "by turns",
    "nothing left behind",
    "gives? way",
]


def test_the_package_avoids_banned_phrases():
    found = []
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [
                f"{path.relative_to(PACKAGE)}:{number}: {phrase}"
                for phrase in BANNED
                if re.search(rf"\b{phrase}", line)
            ]
    assert not found, "\n".join(found)


def skeletons() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def test_the_skeletons_run_and_are_short(monkeypatch):
    from pyro_vae.utils import serialization

    monkeypatch.setattr(serialization, "_CLASSES", dict(serialization._CLASSES))
    names = {**vars(guides), **vars(likelihoods), **vars(priors), **vars(objectives)}
    names |= {"dist": dist, "nn": nn, "torch": torch, "__name__": "skeleton"}
    for code in skeletons():
        assert code.count("\n") <= 15
        exec(code, names)
    vae = VAE(
        prior=names["Laplace"](2),
        likelihood=names["Exponential"](2, (5,), hidden_features=(4,)),
        guide=names["Cauchy"]((5,), 2, hidden_features=(4,)),
    )
    x = torch.rand(7, 5)
    bound = names["SampledELBO"](3).loss(vae.model, vae.guide, x)
    assert bound > 0
