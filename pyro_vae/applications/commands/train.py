"""`pyro-vae train`: choose a VAE for data, train it, and write it to a file."""

import argparse
import math
import time
from typing import Any

import torch

from pyro_vae.applications.commands.choices import Choice, build_estimator, build_vae, choose
from pyro_vae.applications.commands.data import Data, numbers, read_data, require_complete
from pyro_vae.applications.commands.model_file import DataKind, save_model
from pyro_vae.applications.commands.results import note, write_json
from pyro_vae.applications.commands.tables import require_writable
from pyro_vae.data import Images
from pyro_vae.training import History, fit
from pyro_vae.utils.isolation import derived_seed, isolated_generators

__all__ = ["train"]

_BUILD = 97  # a stream of random numbers
_LATENT_DIM, _LATENT_DIM_OF_TABLE = 20, 10  # at most
_BATCH, _LEAST_BATCH, _STEPS = 128, 16, 32  # a small table is cut in at least 32 batches
_HELD_OUT, _PATIENCE = 0.1, 10
_FEW = 20  # rows of which none are held out


def train(args: argparse.Namespace) -> None:
    """Train a VAE on data by path.

    Raises:
        ValueError: If data or options are invalid; the message says which, and what to do.
    """
    require_writable(args.out, ())
    if args.json is not None:
        require_writable(args.json, ())
    if args.resume and args.checkpoint_dir is None:
        raise ValueError("--resume continues the run of a --checkpoint-dir: name it")
    data = read_data(args.data, args)
    if args.missing is None:
        require_complete(data, "pass --missing nan to train on what is there, or correct it")
    choice = choose(data, args.likelihood, args.binarize)
    validation = _validation(args, data)
    _fill_in_defaults(args, data, validation)
    estimator = build_estimator(args.estimator, args.particles, missing=args.missing is not None)
    with isolated_generators(torch.device("cpu"), derived_seed(args.seed, _BUILD)):
        vae = build_vae(data, choice, args).to(args.device)
    dtype = next(vae.parameters()).dtype
    _describe(data, choice, args)
    started = time.perf_counter()
    history = fit(
        vae,
        numbers(data, dtype),
        estimator=estimator,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        learning_rate=args.learning_rate,
        validation=validation if isinstance(validation, float) else numbers(validation, dtype),
        binarize=choice.binarize,
        missing=args.missing,
        patience=args.patience or None,
        progress=not args.quiet,
        checkpoint_dir=args.checkpoint_dir,
        resume=args.resume,
    )
    save_model(args.out, vae, DataKind(data.columns, choice.binarize, args.missing))
    print(history)
    print(f"wrote {args.out}")
    write_json(args.json, _results(args, data, choice, history, time.perf_counter() - started))


def _validation(args: argparse.Namespace, train_data: Data) -> float | Data:
    """Return the fraction to hold out, or the data at a path."""
    if args.validation is None:
        return _HELD_OUT if len(train_data.values) >= _FEW else 0.0
    try:
        fraction = float(args.validation)
    except ValueError:
        data = read_data(args.validation, args, columns=train_data.columns)
        if args.missing is None:
            require_complete(data, "pass --missing nan, or correct it")
        return data
    if not 0 <= fraction < 1:
        raise ValueError(f"--validation must be a fraction in [0, 1), or data by path; got {args.validation}")
    return fraction


def _fill_in_defaults(args: argparse.Namespace, data: Data, validation: float | Data) -> None:
    """Set the options that depend on the data."""
    is_table = len(data.values.shape) == 2 and not data.grey
    num_rows, size = data.values.shape[:2]
    if args.latent_dim is None:
        args.latent_dim = min(_LATENT_DIM_OF_TABLE, max(1, size // 2)) if is_table else _LATENT_DIM
    held_out = math.ceil(validation * num_rows) if isinstance(validation, float) else 0
    if args.batch_size is None:
        fitting = num_rows // _STEPS if is_table else _BATCH
        args.batch_size = max(1, min(_BATCH, max(_LEAST_BATCH, fitting), num_rows - held_out))
    if args.patience is None:
        # the bound that is trained where values are missing is not the ELBO that would be watched
        args.patience = 0 if args.missing is not None or validation == 0.0 else _PATIENCE


def _describe(data: Data, choice: Choice, args: argparse.Namespace) -> None:
    x = data.values
    size = " x ".join(str(n) for n in x.shape[1:])
    what = "images" if isinstance(x, Images) else "rows"
    binarised = "" if choice.binarize is None else f", binarised ({choice.binarize})"
    note(f"{data.name}: {len(x):,} {what} of {size}")
    remedy = " (--likelihood chooses another)" if args.likelihood == "auto" else ""
    note(f"likelihood {choice.likelihood}{binarised}: {choice.reason}{remedy}")
    note(
        f"prior {args.prior}, guide {args.guide}, {args.latent_dim} latent dimensions, hidden layers "
        f"{' '.join(map(str, args.hidden))}"
    )


def _results(
    args: argparse.Namespace, data: Data, choice: Choice, history: History, seconds: float
) -> dict[str, Any]:
    last = max(history, key=lambda e: e.validation_elbo) if args.patience else history[-1]
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    return {
        "model": args.out,
        "data": data.name,
        "rows": len(data.values),
        "columns": data.columns,
        "likelihood": choice.likelihood,
        "reason": choice.reason,
        "binarize": choice.binarize,
        "epochs": len(history),
        "epoch_of_model": last.epoch,
        "train_bound": last.train_bound,
        "train_bound_se": last.train_bound_se,
        "validation_elbo": last.validation_elbo,
        "validation_elbo_se": last.validation_elbo_se,
        "seconds": seconds,
        "settings": settings,
        "history": history.columns(),
    }
