"""Variational autoencoders as probabilistic programs in Pyro.

The generative model p(z) p(x|z) and the guide q(z|x) are plain Pyro functions:

    import pyro_vae as pv

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    history = pv.fit(vae, pv.data.load("mnist"), binarize="dynamic", epochs=10)
"""

from pyro_vae import data, guides, likelihoods, networks, priors
from pyro_vae.checkpoints import CheckpointError
from pyro_vae.svi import SVI, NonFiniteError
from pyro_vae.vae import VAE

__all__ = [
    "SVI",
    "VAE",
    "CheckpointError",
    "NonFiniteError",
    "data",
    "guides",
    "likelihoods",
    "networks",
    "priors",
]
