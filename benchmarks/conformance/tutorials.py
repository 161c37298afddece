"""Pairs in the manner of Pyro's tutorials that the tests do not hold, written anew: name, pair and loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.distributions.transforms import affine_autoregressive, spline_coupling
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGaussian, AutoIAFNormal, AutoNormal, AutoStructured
from pyro.infer.reparam import LatentStableReparam
from torch import nn
from torch.distributions import constraints

__all__ = ["TUTORIALS"]

N = 7
Pair = tuple[Callable, Callable, tuple]


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal((x * slope).sum(-1), 0.5), obs=y)


def with_guide(make: Callable) -> Pair:
    return regression, make(regression), (torch.randn(N, 3), torch.randn(N))


def flow_guide(transform: Callable) -> Pair:
    """Normalizing flows as guides."""
    flow = transform(3)

    def guide(x, y):
        pyro.module("flow", flow)
        pyro.sample(
            "slope", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow])
        )

    return regression, guide, (torch.randn(N, 3), torch.randn(N))


def autoencoder() -> Pair:
    """The variational autoencoder."""
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 4))
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 6))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (torch.bernoulli(torch.full((N, 6), 0.4)),)


def semi_supervised() -> Pair:
    """A label that the guide enumerates, as in the semi-supervised autoencoder."""
    classify = nn.Linear(6, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.OneHotCategorical(torch.ones(len(x), 3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            loc = label[..., :1] + z
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 6), 1.0).to_event(1), obs=x)

    @config_enumerate
    def guide(x):
        pyro.module("classify", classify)
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.OneHotCategorical(logits=classify(x)))
            pyro.sample("z", dist.Normal(x[..., :1], 1.0).to_event(1), infer={"enumerate": None})

    return model, guide, (torch.randn(N, 6),)


def baseline() -> Pair:
    """A score-function gradient with a decaying average as baseline."""

    def model(x):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(on, 1.0), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.1))
        options = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}
        with pyro.plate("data", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=weight * x), infer=options)

    return model, guide, (torch.randn(N),)


def sticks() -> Pair:
    """A Dirichlet process mixture, truncated."""

    def model(x):
        with pyro.plate("sticks", 3):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
        with pyro.plate("components", 4):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        rest = nn.functional.pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
        weight = nn.functional.pad(beta, (0, 1), value=1.0) * rest
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weight))
            pyro.sample("x", dist.Normal(mean[kind], 1.0), obs=x)

    def guide(x):
        kappa = pyro.param("kappa", torch.full((3,), 1.2), constraint=constraints.positive)
        loc = pyro.param("loc", torch.linspace(-1.0, 1.0, 4))
        phi = pyro.param("phi", torch.full((len(x), 4), 0.25), constraint=constraints.simplex)
        with pyro.plate("sticks", 3):
            pyro.sample("beta", dist.Beta(1.0, kappa))
        with pyro.plate("components", 4):
            pyro.sample("mean", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(phi))

    return model, guide, (torch.randn(N),)


def stable() -> Pair:
    """A heavy-tailed latent, reparameterised."""

    @poutine.reparam(config={"drift": LatentStableReparam()})
    def model(x):
        drift = pyro.sample("drift", dist.Stable(1.7, 0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(drift, 1.0), obs=x)

    return model, AutoNormal(model), (torch.randn(N),)


def gaussian_process(kind: str) -> Pair:
    """Gaussian process regression: without priors, with priors on the kernel, with inducing inputs."""
    x = torch.linspace(0.0, 3.0, N)
    y, inducing, kernel = x.sin(), x[::3].clone(), gp.kernels.RBF(1)
    process: gp.models.GPModel
    if kind == "sparse":
        process = gp.models.SparseGPRegression(x, y, kernel, Xu=inducing, jitter=1e-5)
    elif kind == "variational":
        likelihood = gp.likelihoods.Gaussian(torch.tensor(0.3))
        process = gp.models.VariationalSparseGP(x, y, kernel, Xu=inducing, likelihood=likelihood, jitter=1e-5)
    else:
        process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.3))
    if kind == "exact":
        process.kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
        process.kernel.autoguide("lengthscale", dist.Normal)
    return process.model, process.guide, ()


def latent_inputs() -> Pair:
    """A Gaussian process whose inputs are latent."""
    x = torch.randn(N, 2)
    kernel = gp.kernels.RBF(2, lengthscale=torch.ones(2))
    process = gp.models.SparseGPRegression(x, torch.randn(3, N), kernel, Xu=x[:3].clone(), jitter=1e-5)
    process.X = pyro.nn.PyroSample(dist.Normal(x, 0.1).to_event())
    process.autoguide("X", dist.Normal)
    return process.model, process.guide, ()


def neural_topics() -> Pair:
    """Topics by an autoencoder with dropout and batch normalisation."""
    encoder = nn.Sequential(
        nn.Linear(6, 5), nn.Softplus(), nn.Dropout(0.2), nn.Linear(5, 4), nn.BatchNorm1d(4)
    )
    decoder = nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6), nn.Softmax(-1))

    def model(counts):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", len(counts)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(counts), 2), 1.0).to_event(1))
            total = int(counts.sum(-1).max())
            pyro.sample("counts", dist.Multinomial(total, decoder(z.softmax(-1))), obs=counts)

    def guide(counts):
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(counts)):
            loc, log_scale = encoder(counts).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (log_scale / 2).exp()).to_event(1))

    return model, guide, (torch.poisson(torch.full((N, 6), 4.0)),)


def subsampled_plates() -> Pair:
    """An automatic guide whose plates are subsampled as the model's are."""

    def plates(x):
        return pyro.plate("data", N, subsample_size=3)

    def model(x):
        with plates(x) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    return model, AutoNormal(model, create_plates=plates), (torch.randn(N),)


def simple_elbo(model, guide, *args):
    """The ELBO as the tutorial on custom objectives writes it."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def regularised(model, guide, *args):
    penalty = sum(value.square().sum() for value in pyro.get_param_store().values())
    return Trace_ELBO().differentiable_loss(model, guide, *args) + 0.1 * penalty


def annealed() -> Pair:
    """A weight of the latent terms, as an argument."""

    def model(x, weight):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, weight):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide, (torch.randn(N), 0.2)


def nothing_to_learn() -> Pair:
    def guide(x, y):
        pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    return regression, guide, (torch.randn(N, 3), torch.randn(N))


enumerated = partial(TraceEnum_ELBO, max_plate_nesting=1)
normals = partial(with_guide, AutoNormal)
TUTORIALS: dict[str, tuple[Callable[[], Pair], Callable[[], Any]]] = {
    "vae": (autoencoder, Trace_ELBO),
    "vae, mean field": (autoencoder, TraceMeanField_ELBO),
    "vae, Rényi": (autoencoder, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "ss-vae, enumerated": (semi_supervised, enumerated),
    "svi_part_iii, baseline": (baseline, TraceGraph_ELBO),
    "dirichlet_process_mixture": (sticks, Trace_ELBO),
    "dirichlet_process_mixture, TraceGraph": (sticks, TraceGraph_ELBO),
    "stable, LatentStableReparam": (stable, Trace_ELBO),
    "gp, maximum likelihood": (partial(gaussian_process, "plain"), Trace_ELBO),
    "gp, exact": (partial(gaussian_process, "exact"), Trace_ELBO),
    "gp, sparse": (partial(gaussian_process, "sparse"), Trace_ELBO),
    "gp, variational": (partial(gaussian_process, "variational"), TraceMeanField_ELBO),
    "gplvm": (latent_inputs, Trace_ELBO),
    "prodlda": (neural_topics, TraceMeanField_ELBO),
    "AutoNormal, subsampled plates": (subsampled_plates, Trace_ELBO),
    "flow guide, affine autoregressive": (partial(flow_guide, affine_autoregressive), Trace_ELBO),
    "flow guide, spline coupling": (partial(flow_guide, spline_coupling), Trace_ELBO),
    "AutoIAFNormal": (partial(with_guide, AutoIAFNormal), Trace_ELBO),
    "AutoStructured": (partial(with_guide, AutoStructured), Trace_ELBO),
    "AutoGaussian": (partial(with_guide, AutoGaussian), Trace_ELBO),
    "custom_objectives, a function": (normals, lambda: simple_elbo),
    "custom_objectives, regularised": (normals, lambda: regularised),
    "loss JitTrace_ELBO": (normals, JitTrace_ELBO),
    "loss JitTraceMeanField_ELBO": (autoencoder, JitTraceMeanField_ELBO),
    "loss JitTraceEnum_ELBO": (semi_supervised, partial(JitTraceEnum_ELBO, max_plate_nesting=1)),
    "custom_objectives, annealed": (annealed, Trace_ELBO),
    "loss ReweightedWakeSleep": (normals, lambda: ReweightedWakeSleep(num_particles=3)),
    "loss TraceTailAdaptive_ELBO": (
        normals,
        lambda: TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
    ),
    "loss EnergyDistance": (normals, lambda: EnergyDistance(num_particles=3)),
    "loss Trace_MMD": (
        autoencoder,
        lambda: Trace_MMD(kernel=gp.kernels.RBF(2, lengthscale=torch.ones(2)), num_particles=3),
    ),
    "loss elbo.differentiable_loss": (normals, lambda: Trace_ELBO().differentiable_loss),
    "nothing to learn": (nothing_to_learn, Trace_ELBO),
}
