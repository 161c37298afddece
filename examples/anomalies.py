"""Find odd images with a VAE of digits: AUROC of every score, p-values, and where an image is odd.

    uv run examples/anomalies.py
    uv run examples/anomalies.py --epochs 100

Look at which scores find black and dark images, and which hold them for normal (below 0.5). explained.png
shows where images with a white patch are odd.
"""

import argparse
import signal
from pathlib import Path

import torch
from torch import Tensor

import pyro_vae as pv


def auroc(normal: Tensor, odd: Tensor) -> float:
    """Probability that a normal example has a higher score than an odd one; ties count one half."""
    above = (normal[:, None] > odd).double() + 0.5 * (normal[:, None] == odd).double()
    return float(above.mean())


def main() -> None:
    """Train, score, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/anomalies"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.DiscretizedLogistic(20, (1, 28, 28)),
        guide=pv.guides.DiagonalNormal((1, 28, 28), 20),
    )
    pv.fit(vae, pv.data.load("digits"), epochs=args.epochs, seed=args.seed)

    held_out = pv.data.load("digits", split="test")[:]
    reference, x = held_out.tensor_split([3 * len(held_out) // 5])
    odd = {
        "upside down": x.flip(2),
        "dark": (x * 64).round() / 255,
        "black": torch.zeros_like(x[:1]),
        "noise": (torch.rand_like(x) * 255).round() / 255,
    }
    scores = pv.applications.anomaly_scores(vae, x, reference=reference)
    names = [name for name in scores if name not in ("pareto_k", "effective_sample_size")]
    print(f"{'AUROC':22}" + "".join(f"{kind:>13}" for kind in odd))
    found = {kind: pv.applications.anomaly_scores(vae, y, reference=reference) for kind, y in odd.items()}
    for name in names:
        normal = torch.from_numpy(scores[name].values)
        row = [auroc(normal, torch.from_numpy(other[name].values)) for other in found.values()]
        print(f"{name:22}" + "".join(f"{value:13.3f}" for value in row))

    detector = pv.applications.AnomalyDetector(vae, contamination=0.05).fit(reference)
    rate = float((detector.p_value(x) <= 0.05).double().mean())
    print(f"false alarms at 5 %: {rate:.1%} of {len(x)} digits")
    spotted = x[:8].clone()
    spotted[4:, :, 3:7, 3:7] = 1.0
    args.output.mkdir(parents=True, exist_ok=True)
    pv.plots.save(pv.plots.heat_map(spotted, detector.explain(spotted)), args.output / "explained.png")
    print(f"figure in {args.output / 'explained.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing is saved before the end
    main()
