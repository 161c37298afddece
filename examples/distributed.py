"""The same script on one process or many: a VAE of digits, trained and evaluated together.

    uv run examples/distributed.py
    uv run torchrun --nproc-per-node 2 examples/distributed.py

With shards=4 the runs agree up to rounding on 1, 2, 3 or 4 processes, and one that was stopped goes on with
another number by --resume. On several machines, add torchrun's options --nnodes and --rdzv-endpoint; only the
first process writes, so that no shared folder is needed. Look at log p(x), which is the same.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import pyro_vae as pv

SHAPE, LATENT = (1, 28, 28), 20


def main() -> None:
    """Train and evaluate; the first process prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--output", type=Path, default=Path("runs/distributed"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(LATENT, SHAPE),
        guide=pv.guides.DiagonalNormal(SHAPE, LATENT),
    )
    pv.fit(
        vae,
        pv.data.load("digits", split="train", binarize="dynamic"),
        epochs=args.epochs,
        batch_size=200,  # of all processes together
        shards=4,  # at least the number of processes
        seed=args.seed,
        checkpoint_dir=args.output,
        resume=args.resume,
    )
    test = pv.data.load("digits", split="test", binarize="fixed").subset(slice(500))
    report = pv.evaluate(vae, test, num_particles=200)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{os.environ.get('WORLD_SIZE', '1')} processes\n{report}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted" + ("; --resume continues it" if str(interrupt) else ""), file=sys.stderr)
        sys.exit(130)
