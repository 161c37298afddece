"""The command line: commands, their options, an example of each."""

import argparse
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_vae.applications.commands.choices import ESTIMATORS, GUIDES, LIKELIHOODS, PRIORS
from pyro_vae.applications.commands.code import compress, decompress, list_files
from pyro_vae.applications.commands.train import train
from pyro_vae.applications.commands.use import embed, evaluate_model, fill_in, find_anomalies
from pyro_vae.applications.posterior_draws import METHODS
from pyro_vae.applications.scores import SCORES
from pyro_vae.data.images import BINARIZE_MODES

__all__ = ["build_parser"]

_DESCRIPTION = """\
Train a variational autoencoder on a file, and use it.

    pyro-vae train measurements.csv --out vae.pt
    pyro-vae evaluate measurements.csv --model vae.pt
    pyro-vae embed measurements.csv codes.csv --model vae.pt

DATA is a .csv, .tsv, .parquet, .npy or .npz file, a folder of images, or the name of a published set: digits,
mnist, fashion-mnist, kmnist, emnist-letters. `pyro-vae COMMAND --help` shows the options and an example.

Exit status: 0 on success; 1, after a sentence on standard error, for invalid data or files; 2 for wrong
usage; 130 if interrupted.
"""
_DATA = "a .csv, .tsv, .parquet, .npy or .npz file, a folder of images, or a name such as digits"
_DEFAULT = "(default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the function to call as `command`.

    Example:
        >>> args = build_parser().parse_args(["list", "digits.pvz"])
        >>> args.command.__name__, [path.name for path in args.files]
        ('list_files', ['digits.pvz'])
    """
    parser = argparse.ArgumentParser(
        prog="pyro-vae",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    help_text = "print the versions of pyro-vae, Pyro and torch"
    parser.add_argument("-V", "--version", action="version", version=_version(), help=help_text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_evaluate, _add_embed, _add_anomalies, _add_impute, _add_codec, _add_list):
        add(commands)
    return parser


def _version() -> str:
    try:
        version = importlib.metadata.version("pyro_vae")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        version = "(not installed)"
    return f"pyro-vae {version}, Pyro {pyro.__version__}, torch {torch.__version__}"


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=function)
    return parser


def _add_train(commands: Any) -> None:
    sub = _command(
        commands,
        "train",
        train,
        "train a VAE on data and write it to a file",
        "pyro-vae train measurements.csv --drop species --out vae.pt\n"
        "pyro-vae train digits --out vae.pt --hidden 400 --checkpoint-dir runs/digits",
    )
    sub.add_argument("data", metavar="DATA", help=_DATA)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model; VAE.load reads it")
    _add_model_options(sub.add_argument_group("model"))
    _add_training_options(sub.add_argument_group("training"))
    _add_missing(sub)
    _add_json(sub)
    _add_common(sub)


def _add_model_options(group: Any) -> None:
    group.add_argument(
        "--likelihood",
        choices=["auto", *LIKELIHOODS],
        default="auto",
        help="p(x|z); auto chooses by the values, and says why",
    )
    group.add_argument("--prior", choices=PRIORS, default="standard", help=f"p(z) {_DEFAULT}")
    group.add_argument("--guide", choices=GUIDES, default="diagonal", help=f"q(z|x) {_DEFAULT}")
    group.add_argument(
        "--latent-dim",
        type=_count,
        metavar="K",
        help="dimensions of z (default: 20; half the columns of a table, at most 10)",
    )
    group.add_argument(
        "--hidden",
        type=_count,
        nargs="+",
        default=[400],
        metavar="UNITS",
        help="hidden layers of the encoder; the decoder has them in reverse (default: 400)",
    )


def _add_training_options(group: Any) -> None:
    group.add_argument(
        "--estimator",
        choices=["auto", *ESTIMATORS],
        default="auto",
        help="bound that is maximised (default: the ELBO, with its KL in closed form if there is one; with "
        "--missing nan, iwae of 20 particles)",
    )
    group.add_argument("--particles", type=_count, metavar="S", help="draws of z per example and step")
    group.add_argument("--epochs", type=_count, default=100, metavar="N", help=f"at most {_DEFAULT}")
    group.add_argument(
        "--patience",
        type=_whole,
        metavar="N",
        help="stop after N epochs without a better validation ELBO, 0 for never; the model is then that of "
        "the best epoch (default: 10; 0 without validation, and with --missing nan)",
    )
    group.add_argument(
        "--validation",
        metavar="FRACTION|DATA",
        help="rows held out, as a fraction, or other data (default: 0.1, or 0 of fewer than 20 rows)",
    )
    group.add_argument(
        "--batch-size", type=_count, metavar="N", help="rows per step (default: 128; 16 to 128 of a table)"
    )
    group.add_argument(
        "--learning-rate", type=float, default=1e-3, metavar="RATE", help=f"of Adam {_DEFAULT}"
    )
    _add_binarize(group)
    group.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="save the run there after each epoch"
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --checkpoint-dir")


def _add_evaluate(commands: Any) -> None:
    sub = _command(
        commands,
        "evaluate",
        evaluate_model,
        "estimate log p(x) of data, and diagnose the guide",
        "pyro-vae evaluate digits --split test --model vae.pt --json report.json",
    )
    sub.add_argument("data", metavar="DATA", help=_DATA)
    _add_model(sub)
    _add_particles(sub, 100)
    _add_binarize(sub)
    _add_missing(sub)
    _add_json(sub)
    _add_common(sub)


def _add_embed(commands: Any) -> None:
    sub = _command(
        commands,
        "embed",
        embed,
        "write the mean of q(z|x) for each example",
        "pyro-vae embed measurements.csv codes.csv --model vae.pt",
    )
    sub.add_argument("data", metavar="DATA", help=_DATA)
    sub.add_argument("out", type=Path, metavar="OUT", help="a .npy, .csv, .tsv or .parquet file")
    _add_model(sub)
    _add_missing(sub)
    _add_common(sub)


def _add_anomalies(commands: Any) -> None:
    sub = _command(
        commands,
        "anomalies",
        find_anomalies,
        "write score, p-value and flag of each example",
        "pyro-vae anomalies today.csv found.csv --model vae.pt --reference normal.csv",
    )
    sub.add_argument("data", metavar="DATA", help=_DATA)
    sub.add_argument("out", type=Path, metavar="OUT", help="a .csv, .tsv or .parquet file")
    _add_model(sub)
    sub.add_argument(
        "--reference",
        required=True,
        metavar="DATA",
        help="normal examples that the model was not trained on",
    )
    sub.add_argument("--reference-split", metavar="SPLIT", help="its part (default: that of --split)")
    sub.add_argument(
        "--contamination",
        type=_rate,
        default=0.05,
        metavar="RATE|auto",
        help=f"share of normal examples that may be flagged {_DEFAULT}",
    )
    sub.add_argument(
        "--score", choices=SCORES, default="statistics", help=f"what tells odd from normal {_DEFAULT}"
    )
    _add_particles(sub, 50)
    _add_json(sub)
    _add_common(sub)


def _add_impute(commands: Any) -> None:
    sub = _command(
        commands,
        "impute",
        fill_in,
        "fill in missing values by their mean given the others",
        "pyro-vae train holes.csv --missing nan --out vae.pt\n"
        "pyro-vae impute holes.csv filled.csv --model vae.pt",
    )
    sub.add_argument("data", metavar="DATA", help="a .csv, .tsv, .parquet, .npy or .npz file")
    sub.add_argument("out", type=Path, metavar="OUT", help="a file of the same kind; what was there is kept")
    _add_model(sub)
    _add_particles(sub, 1000)
    help_text = f"how missing values are drawn; auto chooses by k̂ {_DEFAULT}"
    sub.add_argument("--method", choices=METHODS, default="auto", help=help_text)
    _add_common(sub, images=False)


def _add_codec(commands: Any) -> None:
    array, compressed = "a .npy file", "a compressed file"
    for name, function, summary, files, example in (
        (
            "compress",
            compress,
            "compress an array by a model",
            (array, compressed),
            "pyro-vae compress x.npy x.pvz --model vae.pt",
        ),
        (
            "decompress",
            decompress,
            "restore the array of a compressed file",
            (compressed, array),
            "pyro-vae decompress x.pvz x.npy --model vae.pt",
        ),
    ):
        sub = _command(commands, name, function, summary, example)
        source, result = files
        sub.add_argument("input", type=Path, metavar="INPUT", help=source)
        sub.add_argument(
            "output", type=Path, metavar="OUTPUT", help=f"{result}, replaced when the command has succeeded"
        )
        help_text = "of pyro-vae train, VAE.save or Codec.save"
        sub.add_argument("--model", type=Path, required=True, metavar="FILE", help=help_text)
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        settings = sub.add_argument_group("of a VAE (decompress takes those of compress)")
        settings.add_argument(
            "--lattice-bits",
            type=int,
            default=8,
            metavar="B",
            help=f"each latent dimension takes 2^B values, 2 to 14; 7 to 9 are best {_DEFAULT}",
        )
        settings.add_argument(
            "--particles",
            type=int,
            default=1,
            metavar="S",
            help=f"draws of z per example: a better rate in S times the time {_DEFAULT}",
        )
        settings.add_argument(
            "--precision",
            choices=["exact", "float64"],
            default="exact",
            help=f"float64: any network, for this kind of machine alone {_DEFAULT}",
        )


def _add_list(commands: Any) -> None:
    summary = "print rows, bits and check of compressed files"
    sub = _command(commands, "list", list_files, summary, "pyro-vae list x.pvz")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written by compress or Codec")


def _add_model(sub: argparse.ArgumentParser) -> None:
    help_text = "of pyro-vae train or VAE.save"
    sub.add_argument("--model", type=Path, required=True, metavar="FILE", help=help_text)


def _add_particles(sub: argparse.ArgumentParser, count: int) -> None:
    help_text = f"draws of z per example {_DEFAULT}"
    sub.add_argument("--num-particles", type=_count, default=count, metavar="S", help=help_text)


def _add_binarize(sub: Any) -> None:
    sub.add_argument(
        "--binarize",
        choices=[*BINARIZE_MODES, "none"],
        help="how grey levels become bits (default: dynamic under a Bernoulli likelihood)",
    )


def _add_missing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--missing", choices=["nan"], help="nan: empty cells and NaN are missing; else they are an error"
    )


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, too")


def _add_data_options(sub: argparse.ArgumentParser, *, images: bool) -> None:
    group = sub.add_argument_group("data")
    group.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="COLUMN",
        help="leave out a column of a table; may be repeated",
    )
    group.add_argument("--array", default="", metavar="NAME", help="array of a .npz file that holds several")
    if not images:
        return
    group.add_argument(
        "--split", default="train", help=f"part of a published set or of a folder of parts {_DEFAULT}"
    )
    group.add_argument("--size", type=_count, metavar="PIXELS", help="scale and crop images of a folder")
    group.add_argument("--mode", choices=["L", "RGB"], help="convert images of a folder to grey or colour")


def _add_common(sub: argparse.ArgumentParser, *, images: bool = True) -> None:
    _add_data_options(sub, images=images)
    help_text = f"of all random numbers {_DEFAULT}"
    sub.add_argument("--seed", type=_whole, default=0, help=help_text)
    sub.add_argument("--device", type=_device, default="cpu", help=f"cpu, cuda, cuda:1 {_DEFAULT}")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _whole(text: str) -> int:
    return _integer(text, 0)


def _count(text: str) -> int:
    return _integer(text, 1)


def _integer(text: str, minimum: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}; got {text!r}")
    return number


def _rate(text: str) -> float | str:
    try:
        rate = 0.05 if text == "auto" else float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a rate in (0, 0.5], or auto; got {text!r}")
    return text if text == "auto" else rate


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return text
