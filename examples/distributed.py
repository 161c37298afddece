"""The same script on one process or many: a VAE of digits, trained and evaluated together.

    uv run examples/distributed.py
    uv run torchrun --nproc-per-node 2 examples/distributed.py

Each takes about a minute on two idle cores. With shards=4 the runs agree up to rounding on 1, 2, 3 or 4
processes, and one that was stopped goes on with another number. On several machines, add torchrun's options
--nnodes and --rdzv-endpoint; only the first process writes, so that no shared folder is needed.
"""

import argparse
import os
from pathlib import Path

import torch

import pyro_vae as pv

SHAPE, LATENT = (1, 28, 28), 20


def main() -> None:
    """Train and evaluate; the first process prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--batch-size", type=int, default=200, help="of all processes together")
    parser.add_argument("--shards", type=int, default=4, help="at least the number of processes")
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("runs/distributed"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, LATENT),
    )
    history = pv.fit(
        vae,
        pv.data.load("digits", split="train", binarize="dynamic"),
        epochs=options.epochs,
        batch_size=options.batch_size,
        shards=options.shards,
        seed=options.seed,
        checkpoint_dir=options.output,
    )
    test = pv.data.load("digits", split="test", binarize="fixed").subset(slice(options.test_size))
    report = pv.evaluate(vae, test, num_particles=200)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{os.environ.get('WORLD_SIZE', '1')} processes, {sum(e.seconds for e in history):.0f} s of steps"
        )
        print(report)


if __name__ == "__main__":
    main()
