"""Compare estimators of the ELBO at one model, then train models with some of the estimators.

    uv run benchmarks/compare_elbos.py
    uv run benchmarks/compare_elbos.py --budget 20s              # equal training time instead of equal steps
    uv run benchmarks/compare_elbos.py --checkpoint vae.pt       # compare at your own model of digits
    uv run benchmarks/compare_elbos.py --train elbo:1 stl:4 dreg:20 vimco:20
    uv run benchmarks/compare_elbos.py --model linear-gaussian   # where log p(x) and ELBO are known

First, a small VAE is trained on digits. At its parameters each estimator is run repeatedly on one batch, for
the bias of its value, the variance and signal-to-noise ratio of its gradient, time and memory. A tighter
bound can have a worse gradient: see the figure of the signal-to-noise ratio by number of particles.

Then a model is trained with each estimator of --train, from the same initial parameters, on the same batches,
for the same number of steps or seconds. The log-evidence of test digits is estimated by importance sampling.

With --model linear-gaussian each estimator is compared with the known value of its bound; nothing is trained.

The tables (CSV, netCDF) and figures are written to the folder --output.
"""

import argparse
import csv
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.closed_form import LinearGaussian
from pyro_vae.comparison.reference_bounds import target
from pyro_vae.objectives.estimators import label
from pyro_vae.utils.display import Estimate
from pyro_vae.utils.serialization import replacing

EVENT, K, HIDDEN = (1, 28, 28), 16, (200,)

# for training; S is the number of particles in each group
ESTIMATORS = {
    "elbo": lambda S: Trace_ELBO(S, vectorize_particles=S > 1, max_plate_nesting=1),
    "mean-field": lambda S: TraceMeanField_ELBO(S, vectorize_particles=S > 1, max_plate_nesting=1),
    "stl": pv.STL,
    "iwae": pv.IWAE,
    "dreg": pv.DReG,
    "miwae": lambda S: pv.IWAE(S, num_groups=4),
    "piwae": lambda S: pv.PIWAE(S, 4),
    "ciwae": lambda S: pv.CIWAE(0.5, S),
    "renyi": lambda S: pv.Renyi(0.5, S),
    "vimco": pv.VIMCO,
}


def estimator(text: str) -> ELBO:
    """Parse an estimator such as "dreg:8": its name and the number of particles in each group."""
    name, _, particles = text.partition(":")
    if name not in ESTIMATORS or not re.fullmatch("[1-9][0-9]*", particles):
        raise argparse.ArgumentTypeError(
            f'must have the form "dreg:8", with a name among {", ".join(ESTIMATORS)}; got "{text}"'
        )
    try:
        return ESTIMATORS[name](int(particles))
    except ValueError as error:  # VIMCO needs at least two particles
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


class Budget(NamedTuple):
    """Training length of each model, in steps or seconds."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse "800steps" or "20s"."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(steps|s)", text)
        if not match or not float(match[1]) > 0:
            raise argparse.ArgumentTypeError(f'must have the form "800steps" or "20s"; got "{text}"')
        return cls(float(match[1]), match[2])


class Trained(NamedTuple):
    """Training curve of a model trained with one estimator, and its final evaluation."""

    steps: list[int]
    seconds: list[float]
    curve: list[float]  # log-evidence of some test images after each epoch
    final: pv.Evaluation


def small_vae(seed: int) -> pv.VAE:
    """Return a VAE of digits with initial parameters drawn from the seed."""
    torch.manual_seed(seed)
    return pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, EVENT, hidden_features=HIDDEN),
        guide=pv.guides.DiagonalNormal(EVENT, K, hidden_features=HIDDEN),
    )


def candidates(particles: int) -> list[ELBO]:
    """Return the estimators to compare, with at most `particles` particles in each group."""
    few, some, many = (max(2, particles // fraction) for fraction in (16, 4, 1))
    return [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        pv.STL(),
        pv.STL(many),
        *(pv.IWAE(S) for S in (few, some, many)),
        *(pv.DReG(S) for S in (few, some, many)),
        pv.IWAE(some, num_groups=4),
        pv.PIWAE(some, 4),
        pv.CIWAE(0.5, many),
        pv.Renyi(0.5, many),
        pv.VIMCO(many),
        pv.KLWeighted(pv.DReG(many), 0.5),
    ]


def side_by_side(
    vae: pv.VAE, x: Tensor, args: argparse.Namespace, *, reference: Tensor | None = None
) -> pv.Comparison:
    """Compare the estimators on a batch, at the same parameters and random numbers; write all results."""
    found = pv.compare_estimators(
        vae.model,
        vae.guide,
        x,
        candidates(args.particles),
        num_repeats=args.repeats,
        reference=reference,
        seed=args.seed,
    )
    print(found)
    found.write_csv(args.output / "estimators.csv")
    with replacing(args.output / "estimators.nc") as partial:
        found.dataset.to_netcdf(partial)
    plots.save(found.plot_forest(), args.output / "values.png")
    for parameters in ("model", "guide"):
        plots.save(found.plot_snr(parameters), args.output / f"snr_{parameters}.png")
    return found


def linear_gaussian(num_data: int, seed: int) -> tuple[LinearGaussian, pv.VAE, Tensor]:
    """Return an exactly solved model, the same model as a VAE with an approximate guide, and data."""
    D, K = 8, 3
    torch.manual_seed(seed)
    exact = LinearGaussian(torch.randn(D, K).double(), torch.randn(D).double(), noise_variance=1.0)
    x = exact.sample(num_data)
    decoder, encoder = nn.Linear(K, D).double(), nn.Linear(D, 2 * K).double()
    decoder.weight.data, decoder.bias.data = exact.W, exact.b
    # the encoder returns the means and raw scales of q; its means are the posterior's, plus noise
    nn.init.normal_(encoder.weight, std=0.03)
    origin = torch.zeros(1, D).double()
    slope = torch.func.jacrev(lambda x: exact.posterior(x).mean)(origin)[0, :, 0]
    encoder.weight.data[:K] += slope
    encoder.bias.data[:K] = exact.posterior(origin).mean[0]
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K).double(),
        likelihood=pv.likelihoods.Normal(K, (D,), network=decoder, variance=1.0),
        guide=pv.guides.DiagonalNormal((D,), K, network=encoder),
    )
    return exact, vae, x


@torch.no_grad()
def print_known_biases(
    exact: LinearGaussian, vae: pv.VAE, x: Tensor, found: pv.Comparison, args: argparse.Namespace
) -> None:
    """Compare the measured biases with the exact ELBO, and with other bounds estimated from many draws."""
    q = vae.encode(x)
    evidence = exact.log_evidence(x).mean().item()
    elbo = exact.elbo(x, q.mean, q.variance.diag_embed()).mean().item()
    print(f"\nbias against log p(x) = {evidence:.6f}: from {args.repeats} steps, and known; nats per datum")
    print(f"{'estimator':27}{'estimated':>20}{'known':>22}{'t':>7}")
    for name, estimator in zip(found["estimator"].values, candidates(args.particles), strict=True):
        known = Estimate(elbo - evidence, 0.0)
        if found["target"].sel(estimator=name).item() != "ELBO":
            known = by_many_draws(estimator, vae, x, args)
            known = known._replace(value=known.value - evidence)
        value, se = (found[part].sel(estimator=name).item() for part in ("bias", "bias_se"))
        t = (value - known.value) / math.hypot(se, known.standard_error)
        label = f"{known.value:.6f} exactly" if known.standard_error == 0 else str(known)
        print(f"{name:27}{Estimate(value, se)!s:>20}{label:>22}{t:>+7.1f}")


def by_many_draws(
    estimator: ELBO, vae: pv.VAE, x: Tensor, args: argparse.Namespace, *, copies: int = 50, rounds: int = 40
) -> Estimate:
    """Estimate an estimator's bound by its definition, from many independent draws per example."""
    plain = target(estimator).reference_estimators["model"]
    bound = (plain.estimator if isinstance(plain, pv.KLWeighted) else plain).estimator
    torch.manual_seed(args.seed + 1)
    many = x.repeat(copies, 1)
    values = torch.tensor([bound.loss(vae.model, vae.guide, many) for _ in range(rounds)]) / -len(many)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(rounds))


def train(
    estimator: ELBO, data: pv.data.Images, test: pv.data.Images, args: argparse.Namespace, bar: tqdm
) -> Trained:
    """Train a model from the common initial parameters until the budget is spent; evaluate each epoch."""
    vae = small_vae(args.seed)
    shown = test.subset(slice(args.curve_size))
    spent: dict[str, list] = {"steps": [0], "s": [0.0]}
    curve = [evaluate(vae, shown, args.curve_particles, args).log_evidence]

    def record(vae: pv.VAE, epoch: pv.Epoch) -> bool:
        spent["steps"].append(spent["steps"][-1] + math.ceil(len(data) / args.batch_size))
        spent["s"].append(spent["s"][-1] + epoch.seconds)
        curve.append(evaluate(vae, shown, args.curve_particles, args).log_evidence)
        before, now = (min(each, args.budget.amount) for each in spent[args.budget.unit][-2:])
        bar.update(now - before)
        return now == args.budget.amount

    pv.fit(
        vae,
        data,
        estimator=estimator,
        epochs=10**6,  # the callback stops training
        batch_size=args.batch_size,
        seed=args.seed,
        callbacks=[record],
        progress=False,
    )
    return Trained(spent["steps"], spent["s"], curve, evaluate(vae, test, args.test_particles, args))


def evaluate(vae: pv.VAE, x: pv.data.Images, particles: int, args: argparse.Namespace) -> pv.Evaluation:
    """Estimate the ELBO and log p(x) of each image, with the same random numbers at each call."""
    return pv.evaluate(vae, x, num_particles=particles, seed=args.seed, aggregate_size=0, progress=False)


def report(results: dict[str, Trained]) -> list[dict[str, Any]]:
    """Print the comparison of the trained models, and return it as rows of a table."""
    evidence = {name: result.final.per_datum.log_evidence for name, result in results.items()}
    best = max(evidence, key=lambda name: evidence[name].mean())
    particles = next(iter(results.values())).final.num_particles
    width = max(len("trained with"), *map(len, results))
    print(
        f"{'trained with':{width}}  {'steps':>6}  {'seconds':>7}  {f'log p(x), L_{particles}':>18}  "
        f"{'minus the best':>16}  {'ELBO':>16}  {'gap':>14}"
    )
    table = []
    for name, result in results.items():
        # paired by image, which has a much smaller error than the difference of the means
        behind = evidence[name] - evidence[best]
        final = {part: result.final.mean(part) for part in ("log_evidence", "elbo", "gap")}
        se = behind.std().item() / math.sqrt(len(behind))
        row = {"trained_with": name, "steps": result.steps[-1], "seconds": result.seconds[-1]}
        for part, (value, error) in final.items():
            row |= {part: value, f"{part}_se": error}
        row |= {"less_the_best": behind.mean().item(), "less_the_best_se": se}
        table.append(row)
        print(
            f"{name:{width}}  {row['steps']:>6,}  {row['seconds']:>7.1f}  {final['log_evidence']!s:>18}  "
            + (
                f"{'(the best)':>16}"
                if name == best
                else f"{row['less_the_best']:>8.2f} ± {se:.2f}".rjust(16)
            )
            + f"  {final['elbo']!s:>16}  {final['gap']!s:>14}"
        )
    print("nats per image ± one standard error over the test images; minus the best: paired by image")
    return table


def draw_curves(results: dict[str, Trained], args: argparse.Namespace) -> Figure:
    """Draw the test log-evidence against steps or seconds, and its final value for each estimator."""
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, result) in enumerate(results.items()):
        style = {"color": plots.PALETTE[number % len(plots.PALETTE)], "marker": "osD^vP*X"[number % 8]}
        x = result.steps if args.budget.unit == "steps" else result.seconds
        left.plot(x, result.curve, markersize=4, label=name, **style)
        value, se = result.final.mean("log_evidence")
        right.errorbar(value, name, xerr=se, linestyle="none", capsize=4, **style)
    low = min(result.curve[len(result.curve) // 4] for result in results.values())
    high = max(max(result.curve) for result in results.values())
    left.set_ylim(low, high + 0.1 * (high - low))  # the initial values are far below
    left.set_xlabel("steps" if args.budget.unit == "steps" else "seconds of training")
    left.set_ylabel(f"L_{args.curve_particles}, nats per image")
    left.set_title(f"Log-evidence of {args.curve_size:,} test digits during training")
    left.legend(loc="lower right")
    right.invert_yaxis()
    right.set_xlabel(f"L_{args.test_particles} ± SE over the images, nats per image")
    right.set_title(f"After training, {args.test_size:,} test digits")
    return figure


def main() -> None:
    """Run the comparison that the options select."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model == "linear-gaussian":
        exact, vae, x = linear_gaussian(args.compare_size, args.seed)
        found = side_by_side(vae, x, args, reference=exact.log_evidence(x))
        print_known_biases(exact, vae, x, found, args)
    else:
        compare_on_digits(args)
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def compare_on_digits(args: argparse.Namespace) -> None:
    """Compare estimators at one VAE of digits; then train VAEs with some estimators and compare the VAEs."""
    data = pv.data.load("digits", split="train", binarize="dynamic")
    test = pv.data.load("digits", split="test", binarize="fixed", seed=args.seed)
    test = test.subset(slice(args.test_size))

    if args.checkpoint:
        vae = pv.VAE.load(args.checkpoint)
    else:
        vae = small_vae(args.seed)
        pv.fit(vae, data, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed)
    side_by_side(vae, test[: args.compare_size], args)

    amount, unit = args.budget
    print(f"\ntraining a model with each of {len(args.train)} estimators, {amount:g} {unit} each")
    results = {}
    with tqdm(total=len(args.train) * amount, unit=f" {unit}", disable=None) as bar:
        for candidate in args.train:
            bar.set_description(label(candidate))
            results[label(candidate)] = train(candidate, data, test, args, bar)
    table = report(results)
    with (
        replacing(args.output / "training.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    plots.save(draw_curves(results, args).axes[0], args.output / "training.png")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("comparison").add_argument
    add("--model", choices=("digits", "linear-gaussian"), default="digits", help="(default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="compare at a VAE of digits saved by VAE.save")
    add("--epochs", type=int, default=15, help="epochs for the model compared at (default: %(default)s)")
    add("--particles", type=int, default=32, help="largest S of the comparison (default: %(default)s)")
    add("--compare-size", type=int, default=32, help="examples in the batch (default: %(default)s)")
    add("--repeats", type=int, default=60, help="steps of each estimator (default: %(default)s)")
    add = parser.add_argument_group("training").add_argument
    add(
        "--train",
        type=estimator,
        nargs="+",
        default=["mean-field:1", "stl:8", "iwae:8", "dreg:8", "piwae:2"],
        metavar="NAME:S",
        help=f"estimators among {', '.join(ESTIMATORS)}, each with its number of particles (miwae and "
        "piwae: particles in each of 4 groups) (default: mean-field:1 stl:8 iwae:8 dreg:8 piwae:2)",
    )
    add(
        "--budget",
        type=Budget.parse,
        default="600steps",
        help='training of each model, "600steps" or "20s", rounded up to epochs (default: %(default)s)',
    )
    add("--batch-size", type=int, default=100, help="images per step (default: %(default)s)")
    add("--curve-size", type=int, default=200, help="test digits for the curves (default: %(default)s)")
    add("--curve-particles", type=int, default=50, help="S for the curves (default: %(default)s)")
    add("--test-size", type=int, default=500, help="test digits after training (default: %(default)s)")
    add("--test-particles", type=int, default=200, help="S after training (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("runs/compare_elbos"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    args.train = [estimator(each) if isinstance(each, str) else each for each in args.train]
    for name in ("epochs", "batch_size", "compare_size", "curve_size", "curve_particles", "test_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.repeats < 10:
        parser.error("--repeats must be at least 10")
    if args.checkpoint and args.model != "digits":
        parser.error("--checkpoint requires --model digits")
    if args.test_particles < 2 or args.particles < 2:
        parser.error("--particles and --test-particles must be at least 2")
    return args


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
