"""Train two guides for a model that is known exactly, and see each reach the gap that theory predicts.

    uv run examples/linear_gaussian.py                   # ten seconds
    uv run examples/linear_gaussian.py --epochs 300

z ~ N(0, I), x ~ N(Wz + b, cI) is fixed; only q(z|x) is trained. The gap log p(x) − ELBO is zero for the best
guide with full covariance, and ½ (Σ log M_kk − log |M|) with M = WᵀW + cI for the best diagonal one.

Look at the columns gap and theory, which more epochs bring closer, and at gap.png: each ELBO rises to its own
line, and never above it.
"""

import argparse
import signal
from functools import partial
from pathlib import Path

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.closed_form import LinearGaussian

D, K, N = 8, 3, 2000


def train(exact: LinearGaussian, x: torch.Tensor, guide: nn.Module, epochs: int, seed: int) -> list[float]:
    """Train a guide for the exact model; return its gap after each epoch, which is known exactly too."""
    network = nn.Linear(K, D)
    network.weight.data, network.bias.data = exact.W, exact.b
    likelihood = pv.likelihoods.Normal(K, (D,), network=network, variance=exact.noise_variance.item())
    prior = pv.priors.StandardNormal(K)
    vae = pv.VAE(prior=prior, likelihood=likelihood.requires_grad_(False), guide=guide).double()
    gaps = []

    def record(vae: pv.VAE, _: pv.Epoch) -> None:
        q = vae.encode(x)
        covariance = getattr(q, "covariance_matrix", q.variance.diag_embed())
        gaps.append(exact.gap(x, q.mean, covariance).mean().item())

    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    options = {"batch_size": 100, "learning_rate": 0.03, "schedule": schedule, "seed": seed}
    pv.fit(vae, x, epochs=epochs, callbacks=[record], **options)
    return gaps


def main() -> None:
    """Train the guides, compare their gaps with theory, draw their ELBOs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="passes over the data (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/linear_gaussian"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    W = torch.randn(D, K) + torch.randn(D, 1)  # correlated columns, so that the best diagonal guide has a gap
    exact = LinearGaussian(W.double(), b=torch.randn(D).double(), noise_variance=1.0)
    x = exact.sample(N)
    evidence = exact.log_evidence(x).mean().item()
    theory = {"diagonal": exact.diagonal_gap().item(), "full_covariance": 0.0}
    guides = {"diagonal": pv.guides.DiagonalNormal, "full_covariance": pv.guides.FullCovarianceNormal}
    print(f"log p(x) = {evidence:.4f} nats per datum, exactly\n{'guide':16}{'gap':>9}{'theory':>9}")
    curves = {"epoch": range(1, args.epochs + 1)}
    for name, make in guides.items():
        guide = make((D,), K, hidden_features=())  # a linear network, as the posterior mean is linear in x
        gaps = train(exact, x, guide, args.epochs, args.seed)
        curves[f"{name}_elbo"] = [evidence - gap for gap in gaps]
        print(f"{name:16}{gaps[-1]:9.4f}{theory[name]:9.4f}")

    lines = {"log p(x)": evidence, "best diagonal guide, theory": evidence - theory["diagonal"]}
    late = {name: column[args.epochs // 10 :] for name, column in curves.items()}  # the first are far below
    axes = pv.plots.training_curves(late, references=lines, title="ELBO of two guides, exact log p(x)")
    args.output.mkdir(parents=True, exist_ok=True)
    pv.plots.save(axes, args.output / "gap.png")
    print(f"figure in {args.output / 'gap.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
