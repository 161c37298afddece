"""Compare the time of an estimator's step with a decoder pass over the same number of rows.

    uv run benchmarks/estimator_overhead.py [--repeats 30] [--threads 1]

784-200-200-50 tanh, 50 particles on a batch of 128, so 6,400 rows, forward and backward. Two decoder passes
are the references: "likelihood" ends in the Bernoulli log-likelihood, "logits" in a sum of the logits. They
differ by a logarithm and a sigmoid of 5 million logits, which every estimator needs. The overhead of an
estimator is therefore its ratio to "likelihood". All are run in turn. The table shows the first decile of the
process's CPU time, which other processes disturb less than its mean, and far less than wall-clock time.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import ELBO

import pyro_vae as pv

DATA, LATENT, HIDDEN, BATCH, PARTICLES = 784, 50, (200, 200), 128, 50
ESTIMATORS = [
    pv.IWAE(PARTICLES),
    pv.IWAE(10, num_groups=5),
    pv.PIWAE(10, num_groups=5),
    pv.CIWAE(0.5, PARTICLES),
    pv.Renyi(0.5, PARTICLES),
    pv.STL(PARTICLES),
    pv.DReG(PARTICLES),
    pv.VIMCO(PARTICLES),
    pv.KLWeighted(pv.IWAE(PARTICLES), 0.5),
]


def make_steps() -> dict[str, Callable[[], torch.Tensor]]:
    """Return the losses to differentiate, by name: the two decoder passes and the estimators."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, (DATA,), hidden_features=HIDDEN, activation="tanh"),
        guide=pv.guides.DiagonalNormal((DATA,), LATENT, hidden_features=HIDDEN, activation="tanh"),
    )
    x = torch.bernoulli(torch.full((BATCH, DATA), 0.2))
    z = torch.randn(PARTICLES, BATCH, LATENT, requires_grad=True)

    def step(estimator: ELBO) -> Callable[[], torch.Tensor]:
        return lambda: estimator(vae.model, vae.guide)(x)

    passes = {
        "likelihood": lambda: vae.decode(z).log_prob(x).sum(),
        "logits": lambda: vae.likelihood.network(z.flatten(0, 1)).sum(),
    }
    return passes | {repr(estimator): step(estimator) for estimator in ESTIMATORS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="leave Pyro's argument validation on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = make_steps()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with pyro.validation_enabled(options.validate):
        for _ in range(options.repeats + 2):
            for name, step in steps.items():
                started = time.process_time()
                step().backward()
                seconds[name].append(time.process_time() - started)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {options.threads} thread(s)")
    print(f"{'':30}{'ms':>8}{'/ likelihood':>14}{'/ logits':>10}")
    decile = {name: sorted(values[2:])[len(values[2:]) // 10] for name, values in seconds.items()}
    for name, value in decile.items():
        ratios = [value / decile[reference] for reference in ("likelihood", "logits")]
        print(f"{name:30}{1000 * value:8.1f}{ratios[0]:14.3f}{ratios[1]:10.3f}")


if __name__ == "__main__":
    main()
