"""Train guides for a model whose evidence is known exactly, and compare their gaps with theory.

    uv run examples/linear_gaussian.py

The data come from a linear-Gaussian model, z ~ N(0, I), x ~ N(Wz + b, cI), which is known and fixed; only the
guide q(z|x) is trained. The gap log p(x) − ELBO is therefore known exactly. In theory it is zero for the best
guide with full covariance, and ½ (Σ log M_kk − log |M|) with M = WᵀW + cI for the best diagonal guide.

The figure is written to the folder --output.
"""

import argparse
from pathlib import Path

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.closed_form import LinearGaussian
from pyro_vae.networks import positive

D, K, N = 8, 3, 2000
ESTIMATORS = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}


class FullCovariance(nn.Module):
    """User-defined guide with full covariance: any module from x to a distribution over z."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(D, K)
        self.factor = nn.Parameter(torch.zeros(K, K))

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z|x) with a mean linear in x and a constant covariance, like the exact posterior."""
        scale_tril = self.factor.tril(-1) + positive(self.factor.diagonal()).diag()
        return dist.MultivariateNormal(self.mean(x), scale_tril=scale_tril)


def diagonal() -> nn.Module:
    """Return the library's diagonal guide with a linear network; the posterior mean is linear in x."""
    return pv.guides.DiagonalNormal((D,), K, network=nn.Linear(D, 2 * K))


GUIDES = {"diagonal": diagonal, "full covariance": FullCovariance}


def known_likelihood(model: LinearGaussian) -> nn.Module:
    """Return p(x|z) of the model as a likelihood with fixed parameters."""
    network = nn.Linear(K, D)
    network.weight.data, network.bias.data = model.W, model.b
    likelihood = pv.likelihoods.Normal(K, (D,), network=network, variance=model.noise_variance.item())
    return likelihood.requires_grad_(False)


def train(
    model: LinearGaussian, x: Tensor, guide: nn.Module, estimator: ELBO, *, epochs: int, seed: int
) -> list[float]:
    """Train the guide by stochastic variational inference; return the exact gap after each epoch, in nats."""
    vae = pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=known_likelihood(model), guide=guide)
    gaps = []

    def record(vae: pv.VAE, _: pv.Epoch) -> None:
        with torch.no_grad():
            q = vae.encode(x)
            covariance = getattr(q, "covariance_matrix", None)
            covariance = q.variance.diag_embed() if covariance is None else covariance
            gaps.append(model.gap(x, q.mean, covariance).mean().item())

    pv.fit(
        vae,
        x,
        estimator=estimator,
        epochs=epochs,
        seed=seed,
        batch_size=100,
        learning_rate=0.03,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        callbacks=[record],
        progress=False,
    )
    return gaps


def draw(gaps: dict[tuple[str, str], list[float]], evidence: float, predicted: dict[str, float]) -> Figure:
    """Draw the ELBO and the evidence against the epoch, and the gap between the two."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (guide, estimator), gap in gaps.items():
        style = {
            "color": plots.PALETTE[list(GUIDES).index(guide)],
            "linestyle": ["-", ":"][list(ESTIMATORS).index(estimator)],
            "linewidth": [1.5, 3][list(ESTIMATORS).index(estimator)],  # the two often coincide
            "label": f"{guide}, {estimator}",
        }
        epochs = range(1, len(gap) + 1)
        left.plot(epochs, [evidence - nats for nats in gap], **style)
        right.plot(epochs, gap, **style)
    left.axhline(evidence, color="black", linestyle="--", label="log p(x), exact")
    best = right.axhline(
        predicted["diagonal"], color="black", linestyle="--", label="best diagonal guide, theory"
    )
    left.set(xlabel="epoch", ylabel="ELBO (nats per datum)", title="ELBO of each guide, and the evidence")
    # without the first epochs, which are far below
    left.set_ylim(evidence - 6 * predicted["diagonal"], evidence + predicted["diagonal"])
    right.set(
        xlabel="epoch", ylabel="log p(x) − ELBO (nats per datum)", title="Gap of each guide", yscale="log"
    )
    left.legend(loc="lower right")
    right.legend(handles=[best], loc="upper right")
    return figure


def main() -> None:
    """Train the guides, compare their gaps with theory, write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100, help="passes over the data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/linear_gaussian"),
        metavar="DIR",
        help="folder for the figure (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    torch.manual_seed(args.seed)
    W = torch.randn(D, K) + torch.randn(D, 1)  # correlated columns, so that the best diagonal guide has a gap
    model = LinearGaussian(W, b=torch.randn(D), noise_variance=1.0)
    x = model.sample(N)
    evidence = model.log_evidence(x).mean().item()
    predicted = {"diagonal": model.diagonal_gap().item(), "full covariance": 0.0}

    gaps = {}
    for guide, estimator in tqdm([(g, e) for g in GUIDES for e in ESTIMATORS], unit=" guides", disable=None):
        gaps[guide, estimator] = train(
            model, x, GUIDES[guide](), ESTIMATORS[estimator](), epochs=args.epochs, seed=args.seed
        )

    print(f"log p(x) = {evidence:.4f}")
    print(f"{'guide':16} {'estimator':19} {'ELBO':>9} {'gap':>8} {'theory':>8} {'error':>8}")
    for (guide, estimator), (*_, gap) in gaps.items():
        off = (gap - predicted[guide]) / predicted["diagonal"]
        print(
            f"{guide:16} {estimator:19} {evidence - gap:9.4f} {gap:8.4f} {predicted[guide]:8.4f} {off:8.2%}"
        )
    print("all in nats per datum; error: gap − theory, relative to the theoretical gap of the diagonal guide")
    args.output.mkdir(parents=True, exist_ok=True)
    figure = args.output / "elbo_and_gap.png"
    draw(gaps, evidence, predicted).savefig(figure, dpi=150)
    print(f"figure in {figure}")


if __name__ == "__main__":
    main()
