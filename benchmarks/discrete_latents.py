"""Train a clustering VAE, with a categorical and a continuous latent variable, by three estimators.

    uv run benchmarks/discrete_latents.py

    model:  c ~ Categorical(π) → z ~ N(m_c, diag s_c²) → x ~ p(x|z)
    guide:  c ~ q(c|x) → z ~ q(z|x, c)

The prior of z is a mixture of normals, one for each class c. Draws of c are not reparameterised, so three
estimators apply: `TraceEnum_ELBO` sums over all c and draws only z; `TraceGraph_ELBO` and `VIMCO` draw c too
and use the score function for the gradient of q(c|x), the former for the ELBO, the latter for the IWAE bound.

The first model has a linear p(x|z), so p(x) is a mixture of normals that is known exactly
(`closed_form.GaussianMixture`). The model is fixed, the guide can be exact, and each estimator should raise
the ELBO to log p(x). The second model is trained on digits without labels. With the score function it soon
uses a single class; with the sum over c it uses several.

The figures are written to the folder --output.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from tqdm import trange

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.closed_form import GaussianMixture
from pyro_vae.networks import MLP, positive
from pyro_vae.utils.display import Estimate

ESTIMATORS: dict[str, Callable[[int], ELBO]] = {
    "TraceEnum_ELBO": lambda _: TraceEnum_ELBO(max_plate_nesting=1),
    "TraceGraph_ELBO": lambda S: TraceGraph_ELBO(S, max_plate_nesting=1, vectorize_particles=True),
    "VIMCO": pv.VIMCO,
}


class MixtureVAE(nn.Module):
    """Pyro model and guide with C classes and z in K dimensions.

    `network` maps x (N, ...) to C (1 + 2K) outputs: the logit of each class, and the mean and raw scale of z.
    """

    def __init__(self, classes: int, latent_dim: int, likelihood: nn.Module, network: nn.Module):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))
        self.locs = nn.Parameter(torch.randn(classes, latent_dim))
        self.raw_scales = nn.Parameter(torch.full((classes, latent_dim), 0.54))  # so that s = 1
        self.likelihood, self.network = likelihood, network

    def model(self, x: Tensor) -> None:
        """Draw from p(c) p(z|c) p(x|z), with x observed."""
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.locs[c], positive(self.raw_scales)[c]).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw from q(c|x) q(z|x, c)."""
        logits, locs, scales = self.encode(x)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            # Vindex(locs)[..., c, :] is row c of each example, also if c has enumeration dimensions
            pyro.sample("z", dist.Normal(Vindex(locs)[..., c, :], Vindex(scales)[..., c, :]).to_event(1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of q(c|x), (N, C), and mean and standard deviation of q(z|x, c), (N, C, K)."""
        logits, locs, raw_scales = self.network(x).split([len(self.logits), *2 * [self.locs.numel()]], dim=-1)
        locs, raw_scales = (part.unflatten(-1, self.locs.shape) for part in (locs, raw_scales))
        return logits, locs, positive(raw_scales)

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Return E[x|z] for draws z ~ p(z|c) of each class, (C, num_samples, *event_shape)."""
        z = dist.Normal(self.locs, positive(self.raw_scales)).sample((num_samples,))
        return self.likelihood(z.transpose(0, 1)).mean


def solved(seed: int) -> tuple[MixtureVAE, GaussianMixture]:
    """Return a fixed model whose log p(x) is known, with a trainable guide that can be exact, and its p(x).

    p(x|z) = N(Wz + b, vI) and all classes share one s, so that p(x|c) = N(W m_c + b, W diag(s²) Wᵀ + vI). The
    columns of W are orthogonal, so that p(z|x, c) has independent dimensions like q(z|x, c).
    """
    classes, K, D, variance = 4, 2, 5, 0.3
    torch.manual_seed(seed)
    decoder = nn.Linear(K, D)
    decoder.weight.data = torch.linalg.qr(torch.randn(D, K)).Q * torch.tensor([1.0, 0.6])
    likelihood = pv.likelihoods.Normal(K, (D,), network=decoder, variance=variance)
    vae = MixtureVAE(classes, K, likelihood, network=nn.Linear(D, classes * (1 + 2 * K)))
    vae.logits.data, vae.locs.data = torch.tensor([0.0, 0.3, -0.4, 0.8]), 1.5 * vae.locs.data
    vae.raw_scales.data.fill_(-0.5)
    for parameter in (vae.logits, vae.locs, vae.raw_scales, *likelihood.parameters()):
        parameter.requires_grad_(False)
    return vae, marginal(vae)


def marginal(vae: MixtureVAE) -> GaussianMixture:
    """Return p(x) for a linear p(x|z) = N(Wz + b, vI): given c, z ~ N(m_c, diag s_c²) and x is normal too."""
    W, b = vae.likelihood.network.weight, vae.likelihood.network.bias
    noise = vae.likelihood.scale**2 * torch.eye(len(b), dtype=b.dtype)
    covariances = W @ positive(vae.raw_scales).square().diag_embed() @ W.T + noise
    return GaussianMixture(vae.logits.softmax(0), vae.locs @ W.T + b, covariances)


class Trained(NamedTuple):
    """Result of training with one estimator; values in nats per datum, for each test example."""

    vae: MixtureVAE
    steps: list[int]
    curve: list[float]  # mean ELBO of the test data after each entry of `steps`
    seconds: float
    elbo: Tensor
    log_evidence: Tensor  # importance-weighted bound


def train(
    vae: MixtureVAE,
    estimator: ELBO,
    batches: Iterator[Tensor],
    test: Tensor,
    args: argparse.Namespace,
    *,
    lr: float,
) -> Trained:
    """Train a model, with evaluations on the test data in between."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps, eta_min=lr / 20)
    guide = config_enumerate(vae.guide) if isinstance(estimator, TraceEnum_ELBO) else vae.guide
    svi = pv.SVI(vae.model, guide, optimizer, estimator)
    steps, curve, seconds = [0], [enumerated_elbo(vae, test)], 0.0
    every = max(1, args.steps // 25)
    for step in trange(
        1, args.steps + 1, desc=type(estimator).__name__, unit=" steps", leave=False, disable=None
    ):
        started = time.perf_counter()
        svi.step(next(batches))
        schedule.step()
        seconds += time.perf_counter() - started
        if step % every == 0 or step == args.steps:
            steps.append(step)
            curve.append(enumerated_elbo(vae, test))
    evaluation = pv.evaluate(
        vae, test, num_particles=args.draws, seed=args.seed, aggregate_size=0, progress=False
    ).per_datum
    return Trained(vae, steps, curve, seconds, evaluation.elbo_sampled_kl, evaluation.log_evidence)


@torch.no_grad()
def enumerated_elbo(vae: MixtureVAE, x: Tensor) -> float:
    """Return the mean ELBO, exact in c, with one draw of z per class from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return -TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, config_enumerate(vae.guide), x) / len(x)


def train_each(
    make: Callable[[], MixtureVAE],
    data: pv.data.Images | Tensor,
    test: Tensor,
    args: argparse.Namespace,
    *,
    lr: float,
) -> dict[str, Trained]:
    """Train with each estimator, from the same initial parameters and on the same batches."""
    results = {}
    for name, estimator in ESTIMATORS.items():
        vae = make()
        torch.manual_seed(args.seed)
        order = torch.Generator().manual_seed(args.seed)
        batches = (data[torch.randint(len(data), (args.batch_size,), generator=order)] for _ in iter(int, 1))
        results[name] = train(vae, estimator(args.particles), batches, test, args, lr=lr)
    return results


def mean(values: Tensor) -> str:
    """Return the mean of values and its standard error as text."""
    return str(Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values))))


def print_against_evidence(results: dict[str, Trained], exact: Tensor) -> None:
    """Print the gap of each guide to the exact log p(x) (N,)."""
    print(f"\nexactly solved model: log p(x) = {mean(exact)} nats per datum")
    print(f"{'trained with':17}{'ELBO − log p(x)':>22}{'bound − log p(x)':>22}{'seconds':>9}")
    for name, result in results.items():
        gaps = mean(result.elbo - exact), mean(result.log_evidence - exact)
        print(f"{name:17}{gaps[0]:>22}{gaps[1]:>22}{result.seconds:>9.1f}")
    print("paired by example, ± one standard error over the test data")


def draw_against_evidence(results: dict[str, Trained], exact: float) -> Figure:
    """Draw the ELBO and the exact log p(x) against the steps, and the gap between the two."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, (name, result) in zip(styles(), results.items(), strict=False):
        left.plot(result.steps, result.curve, label=name, **style)
        right.plot(result.steps, [exact - elbo for elbo in result.curve], label=name, **style)
    left.axhline(exact, color="black", linestyle="--", label="log p(x), exact")
    left.set(xlabel="steps", ylabel="ELBO, nats per datum", title="ELBO of the test data")
    low = min(result.curve[len(result.curve) // 4] for result in results.values())
    left.set_ylim(low, exact + 0.1 * (exact - low))  # the initial values are far below
    right.set(xlabel="steps", ylabel="log p(x) − ELBO, nats per datum", title="Gap", yscale="log")
    left.legend(loc="lower right")
    return figure


def print_each_other(results: dict[str, Trained], test: pv.data.Images, draws: int) -> None:
    """Print a comparison of the models of digits, and how well their classes match the ten digits."""
    best = max(results, key=lambda name: results[name].log_evidence.mean())
    print(f"\n{test.name}, {len(test):,} images")
    print(
        f"{'trained with':17}{'ELBO':>18}{f'log p(x), L_{draws}':>18}{'minus the best':>16}"
        f"{'classes':>9}{'digits':>8}{'seconds':>9}"
    )
    for name, result in results.items():
        behind = result.log_evidence - results[best].log_evidence
        classes, digits = classes_used(result.vae, test)
        print(
            f"{name:17}{mean(result.elbo):>18}{mean(result.log_evidence):>18}"
            f"{'(the best)' if name == best else mean(behind):>16}{classes:>9.1f}{digits:>8.0%}"
            f"{result.seconds:>9.1f}"
        )
    print(
        "nats per image ± one standard error over the images; classes: exp(entropy of the mean q(c|x));\n"
        "digits: images whose digit is the most frequent digit of their class"
    )


@torch.no_grad()
def classes_used(vae: MixtureVAE, test: pv.data.Images) -> tuple[float, float]:
    """Return the effective number of classes, and the accuracy of each class's most frequent digit."""
    probabilities = vae.encode(test[:])[0].softmax(-1)
    entropy = torch.distributions.Categorical(probabilities.mean(0)).entropy()
    counts = torch.zeros(len(vae.logits), 10)
    counts.index_put_((probabilities.argmax(-1), test.labels), torch.tensor(1.0), accumulate=True)
    return entropy.exp().item(), (counts.amax(1).sum() / counts.sum()).item()


def draw_each_other(results: dict[str, Trained], draws: int) -> Figure:
    """Draw the ELBO against the steps, and the final log p(x)."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for style, (name, result) in zip(styles(), results.items(), strict=False):
        left.plot(result.steps, result.curve, label=name, **style)
        value, se = result.log_evidence.mean(), result.log_evidence.std() / math.sqrt(len(result.elbo))
        right.errorbar(value, name, xerr=se, capsize=4, **style | {"linestyle": "none", "markersize": 7})
    high = max(max(result.curve) for result in results.values())
    low = min(result.curve[len(result.curve) // 4] for result in results.values())
    left.set_ylim(low, high + 0.1 * (high - low))  # the initial values are far below
    left.set(xlabel="steps", ylabel="ELBO, nats per image", title="ELBO of the test digits during training")
    left.legend(loc="lower right")
    right.invert_yaxis()
    right.set(xlabel=f"L_{draws} ± SE over the images, nats per image", title="log p(x) after training")
    right.margins(y=0.3)
    return figure


def draw_classes(results: dict[str, Trained], seed: int) -> Figure:
    """Draw samples of each class, one row per class, in order of decreasing probability."""
    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        torch.manual_seed(seed)
        weights = result.vae.logits.detach().softmax(0)
        order = weights.argsort(descending=True)
        rows = result.vae.sample(8)[order]
        plots.image_grid(rows.flatten(0, 1), columns=8, title=name, ax=axes)
        for row, weight in enumerate(weights[order].tolist()):
            axes.text(
                -0.02,
                1 - (row + 0.5) / len(order),
                f"{weight:.2f}",
                ha="right",
                va="center",
                transform=axes.transAxes,
            )
    figure.suptitle("E[x|z] for z ~ p(z|c): one row per class, with its probability π")
    return figure


def styles() -> Iterator[dict]:
    """Yield a line style for each estimator."""
    for color, marker in zip(plots.PALETTE, "osD^", strict=False):
        yield {"color": color, "marker": marker, "markersize": 4}


def main() -> None:
    """Compare the estimators on the exactly solved model, then on digits."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)  # fail before training if it cannot be created

    _, mixture = solved(args.seed)
    torch.manual_seed(args.seed)
    data, test = sample(mixture, 4000), sample(mixture, args.test_size)
    exact = mixture.log_evidence(test)
    results = train_each(lambda: solved(args.seed)[0], data, test, args, lr=0.03)
    print_against_evidence(results, exact)
    plots.save(draw_against_evidence(results, exact.mean().item()).axes[0], args.output / "evidence.png")

    digits = pv.data.load("digits", split="train", binarize="dynamic")
    unseen = pv.data.load("digits", split="test", binarize="fixed", seed=args.seed)
    unseen = unseen.subset(slice(args.test_size))
    results = train_each(lambda: of_digits(args.seed), digits, unseen[:], args, lr=2e-3)
    print_each_other(results, unseen, args.draws)
    plots.save(draw_each_other(results, args.draws).axes[0], args.output / "digits.png")
    plots.save(draw_classes(results, args.seed).axes[0], args.output / "classes.png")
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def sample(mixture: GaussianMixture, num_samples: int) -> Tensor:
    """Draw data from a mixture of normals, (num_samples, D)."""
    c = torch.distributions.Categorical(mixture.weights).sample((num_samples,))
    return torch.distributions.MultivariateNormal(mixture.locs[c], mixture.covariances[c]).sample()


def of_digits(seed: int) -> MixtureVAE:
    """Return a model of binary 28 × 28 images with ten classes; all parameters are trainable."""
    event, classes, K, hidden = (1, 28, 28), 10, 8, (200,)
    torch.manual_seed(seed)
    likelihood = pv.likelihoods.Bernoulli(K, event, hidden_features=hidden)
    return MixtureVAE(
        classes, K, likelihood, network=MLP(math.prod(event), classes * (1 + 2 * K), hidden_features=hidden)
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--particles", type=int, default=10, help="S of TraceGraph_ELBO and VIMCO (default: %(default)s)")
    add("--steps", type=int, default=600, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=int, default=100, help="examples per step (default: %(default)s)")
    add("--test-size", type=int, default=500, help="examples for evaluation (default: %(default)s)")
    add("--draws", type=int, default=100, help="draws per example for log p(x) (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/discrete_latents"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("particles", "test_size", "draws"):
        if getattr(args, name) < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2")
    return args


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
