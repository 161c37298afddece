"""`pyro-vae evaluate`, `embed`, `anomalies` and `impute`: what a trained VAE says of data."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.applications.anomaly import AnomalyDetector
from pyro_vae.applications.commands.data import Data, fill, for_model, read_data, require_complete
from pyro_vae.applications.commands.model_file import Model, load_model
from pyro_vae.applications.commands.results import note, write_json
from pyro_vae.applications.commands.tables import ARRAYS, TABLES, require_writable, write_columns
from pyro_vae.applications.imputation import impute
from pyro_vae.data import Images
from pyro_vae.evaluation import evaluate
from pyro_vae.utils.display import progress_bar
from pyro_vae.utils.isolation import evaluating

__all__ = ["embed", "evaluate_model", "fill_in", "find_anomalies"]

_ROWS = 1024  # encoded at once
_DRAWS = 100  # of z, whose mean stands for that of a guide without one in closed form
_COMPLETE = "pass --missing nan if NaN means missing, or correct it"


def evaluate_model(args: argparse.Namespace) -> None:
    """Print the table of `evaluate` for a model and data.

    Raises:
        ValueError: If the data do not go with the model.
    """
    if args.json is not None:
        require_writable(args.json, ())
    model = load_model(args.model, args.device)
    data = read_data(args.data, args, model=model)
    missing = _missing(args, model, data)
    binarize = args.binarize or (_binarization(model) if data.grey and model.is_binary else None)
    report = evaluate(
        model.vae,
        for_model(data, model),
        num_particles=args.num_particles,
        binarize=None if binarize == "none" else binarize,
        missing=missing,
        seed=args.seed,
        progress=not args.quiet,
    )
    print(report)
    write_json(args.json, {"model": args.model, "data": data.name, **report.as_dict()})


def _binarization(model: Model) -> str:
    return model.kind.binarize or "dynamic"


def _missing(args: argparse.Namespace, model: Model, data: Data) -> str | None:
    """Return "nan" if NaN is missing, as it was in training or as the user says; else raise for NaN."""
    missing = args.missing or model.kind.missing
    if missing is None:
        require_complete(data, _COMPLETE)
    return missing


def embed(args: argparse.Namespace) -> None:
    """Write the means of q(z|x), a row for each example.

    Raises:
        ValueError: If the data do not go with the model.
    """
    require_writable(args.out, (".npy", *TABLES))
    model = load_model(args.model, args.device)
    data = read_data(args.data, args, model=model)
    missing = _missing(args, model, data)
    x = for_model(data, model)
    parts = []
    with (
        evaluating(model.vae, model.device, args.seed),
        progress_bar(len(x), shown=not args.quiet, unit=" rows") as bar,
    ):
        for start in range(0, len(x), _ROWS):
            rows = x[start : start + _ROWS].to(model.dtype)
            parts.append(_means(model, rows, missing=missing is not None).cpu())
            bar.update(len(rows))
    z = torch.cat(parts).numpy()
    write_columns(args.out, {f"z{number}": z[:, number] for number in range(z.shape[1])})
    note(f"wrote {args.out}: {z.shape[0]:,} rows of {z.shape[1]} latent dimensions")


def _means(model: Model, x: Tensor, *, missing: bool) -> Tensor:
    observed = ~x.isnan()
    options: dict[str, Any] = {"observed": observed} if missing else {}
    q = model.vae.encode(torch.where(observed, x, 0.0), **options)
    try:
        return q.mean
    except NotImplementedError:  # of a flow
        return q.sample((_DRAWS,)).mean(0)


def find_anomalies(args: argparse.Namespace) -> None:
    """Write score, p-value and flag of each example: its row, from 0, and in a text table its line.

    Raises:
        ValueError: If the data do not go with the model, or the reference is too small.
    """
    require_writable(args.out, TABLES)
    model = load_model(args.model, args.device)
    options = {"score": args.score, "num_particles": args.num_particles, "seed": args.seed}
    detector = AnomalyDetector(model.vae, contamination=args.contamination, **options)
    reference = read_data(args.reference, args, split=args.reference_split, model=model)
    data = read_data(args.data, args, model=model)
    for each in (reference, data):
        require_complete(each, "anomalies takes complete rows: fill them by pyro-vae impute first")
    x = _scored(data, model)
    detector.fit(_scored(reference, model))
    score, p_value = detector.score_samples(x).numpy(), detector.p_value(x).numpy()
    flag = (score < detector.offset_).astype(np.int64)
    lines = {} if data.table is None or data.table.lines is None else {"line": np.array(data.table.lines)}
    scored = {"row": np.arange(len(score)), **lines, "score": score, "p_value": p_value, "anomaly": flag}
    write_columns(args.out, scored)
    found = {"rows": len(flag), "anomalies": int(flag.sum()), "threshold": detector.offset_}
    note(
        f"wrote {args.out}: {found['anomalies']:,} of {len(flag):,} rows score below {detector.offset_:.4g}"
        + _expected(args.contamination, len(flag))
    )
    write_json(args.json, {"model": args.model, "data": data.name, "reference": reference.name, **found})


def _expected(contamination: float | str, count: int) -> str:
    if isinstance(contamination, str):
        return ""
    return f"; of as many normal rows, about {contamination * count:,.1f} would"


def _scored(data: Data, model: Model) -> Any:
    """Return data for scores, which take no bits drawn at random: those would depend on the position."""
    x = for_model(data, model)
    if not (data.grey and model.is_binary):
        return x
    if isinstance(x, Images):
        return x.binarized("threshold")
    return (x >= 0.5).to(x.dtype)


def fill_in(args: argparse.Namespace) -> None:
    """Write data with E[x_missing | x_observed] in the place of NaN, in the format they came in.

    Raises:
        ValueError: If the data do not go with the model, or are of a kind without holes.
    """
    suffix = Path(args.data).suffix.lower()
    if suffix not in (*ARRAYS, *TABLES):
        raise ValueError(f"impute takes {', '.join((*ARRAYS, *TABLES))}, NaN where missing; got {args.data}")
    require_writable(args.out, (suffix,))
    model = load_model(args.model, args.device)
    data = read_data(args.data, args, model=model)
    x = for_model(data, model)
    if isinstance(x, Images):
        raise ValueError(f"{args.data} holds bytes, of which none is missing")
    holes = x.isnan()
    rows = holes.flatten(1).any(1)
    filled = x.clone()
    if rows.any():
        found = impute(
            model.vae,
            x[rows],
            num_particles=args.num_particles,
            num_draws=1,
            method=args.method,
            seed=args.seed,
        )
        filled[rows] = torch.where(holes[rows], found.mean, x[rows])
        hard = int(found.from_chains.sum())
        if hard:
            note(f"{hard:,} rows were hard for importance sampling (k̂ > 0.7), and were left to chains")
    fill(data, args.out, filled.reshape(len(x), -1).cpu().numpy())
    note(f"wrote {args.out}: {int(holes.sum()):,} values filled in {int(rows.sum()):,} of {len(x):,} rows")
