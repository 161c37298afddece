"""Compare the time of `evaluate` with S draws per image with that of the decoder on as many rows.

    uv run benchmarks/evaluation_throughput.py [--particles 5000] [--images 20] [--repeats 7]

784-200-200-50 tanh. `evaluate` decodes S draws per image. The references run the decoder's network on as many
rows in chunks of the same size, with and without the Bernoulli log-likelihood of the image. All are run in
turn. The table shows medians of CPU time on one thread, which other processes disturb less than
wall-clock time, and of the fraction that the network alone takes. The last line is the peak memory of
`evaluate` above that of the model and the libraries.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import pyro
import torch

import pyro_vae as pv

DATA, LATENT, HIDDEN, ROWS = 784, 50, (200, 200), 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, (DATA,), hidden_features=HIDDEN, activation="tanh"),
        guide=pv.guides.DiagonalNormal((DATA,), LATENT, hidden_features=HIDDEN, activation="tanh"),
    )
    x = torch.bernoulli(torch.full((options.images, DATA), 0.2))
    passes = -(-options.particles * options.images // ROWS)
    z = torch.randn(ROWS, LATENT)

    @torch.no_grad()
    @pyro.validation_enabled(False)  # as in evaluate, which has checked the data
    def repeat(decode: Callable[[], torch.Tensor]) -> None:
        for _ in range(passes):
            decode()

    ways = {
        "decoder network": lambda: repeat(lambda: vae.likelihood.network(z)),
        "and its log-likelihood": lambda: repeat(lambda: vae.decode(z).log_prob(x[0])),
        "evaluate": lambda: pv.evaluate(
            vae, x, num_particles=options.particles, aggregate_size=0, progress=False
        ),
    }
    pv.evaluate(vae, x[:1], num_particles=50, progress=False)  # imports are not measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways["evaluate"]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    draws = options.particles * options.images
    print(f"{options.images} images, S = {options.particles:,}; torch {torch.__version__}, 1 thread")
    print(f"{'':24}{'µs a draw':>10}{'network / this':>16}")
    for name, values in seconds.items():
        share = statistics.median(a / b for a, b in zip(seconds["decoder network"], values, strict=True))
        print(f"{name:24}{statistics.median(values) / draws * 1e6:10.2f}{share:16.2f}")
    print(f"memory of evaluate above what was taken before: {peak / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
