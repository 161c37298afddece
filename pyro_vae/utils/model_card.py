"""What a model is, in a few lines: parts, data, scores, versions, as text, HTML and Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.distributions import constraints

from pyro_vae.utils.display import aligned, html_table
from pyro_vae.utils.validation import elementwise_support

__all__ = [
    "ModelCard",
    "count_parameters",
    "describe_part",
    "describe_scores",
    "describe_support",
    "describe_versions",
]

_WEIGHTS = 6  # shown of a part
_LONGEST = 40  # letters of an argument
_SCORES = {"log_evidence": "log p(x), lower bound", "elbo": "ELBO"}


@dataclass(frozen=True, repr=False)
class ModelCard:
    r"""Description of a model, shown as a table.

    Attributes:
        title: Kind and size of the model.
        rows: Pairs of a name and what stands for it.

    Example:
        >>> card = ModelCard("VAE", (("prior", "StandardNormal"), ("guide", "q(z|x)")))
        >>> card
        VAE
        prior  StandardNormal
        guide  q(z|x)
        >>> print(card.to_markdown())
        # VAE
        <BLANKLINE>
        | | |
        |---|---|
        | prior | StandardNormal |
        | guide | q(z\|x) |
    """

    title: str
    rows: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return "\n".join([self.title, *aligned(self.rows[0], self.rows[1:], left=2)])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return html_table(self.title, ["", ""], self.rows, left=(0, 1))

    def to_markdown(self) -> str:
        """Return the card as Markdown, for a README or a page of a model."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join([f"# {self.title}", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)])


def describe_part(part: Any) -> str:
    """Return the class of a part with its arguments, its number of parameters and the shapes of its weights.

    Example:
        >>> describe_part(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
        'Sequential: 50 parameters, weights 8 × 3, 2 × 8'
    """
    if not isinstance(part, nn.Module):
        return f"the function {getattr(part, '__name__', type(part).__name__)}"
    recorded = getattr(part, "_spec", None) or {"arguments": {}}
    given = {
        name: value
        for name, value in recorded["arguments"].items()
        if value is not None and not isinstance(value, nn.Module)
    }
    arguments = ", ".join(f"{name}={_shortened(value)}" for name, value in given.items())
    found = type(part).__name__ + f"({arguments})" * bool(arguments)
    shapes = [" × ".join(map(str, p.shape)) for p in part.parameters() if p.dim() > 1]
    if not any(True for _ in part.parameters()):
        return found
    weights = ", ".join(shapes[:_WEIGHTS]) + ", …" * (len(shapes) > _WEIGHTS)
    return f"{found}: {count_parameters(part):,} parameters" + f", weights {weights}" * bool(shapes)


def count_parameters(module: nn.Module) -> int:
    """Return the number of values of the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _shortened(value: Any) -> str:
    text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def describe_support(support: constraints.Constraint | None) -> str:
    """Return the values that a distribution takes, in words; "" if that is unknown.

    Example:
        >>> describe_support(constraints.independent(constraints.integer_interval(0, 255), 1))
        'whole numbers from 0 to 255'
    """
    if support is None:
        return ""
    support = elementwise_support(support)
    words = {"Boolean": "0 or 1", "Real": "real numbers", "GreaterThan": "positive numbers"}
    words["IntegerGreaterThan"] = "whole numbers ≥ 0"
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if None not in (lower, upper) and isinstance(lower, int | float):
        kind = "whole numbers" if getattr(support, "is_discrete", False) else "numbers"
        return f"{kind} from {lower:g} to {upper:g}"
    names = [kind.__name__.removeprefix("_") for kind in type(support).__mro__]
    named = next((words[name] for name in names if name in words), None)
    if named is None:
        named = "values of each column's own kind" if hasattr(support, "at") else str(support)
    return named


def describe_scores(scores: Any) -> list[tuple[str, str]]:
    """Return the rows of an `Evaluation`, or of a mapping from names to values.

    Raises:
        TypeError: If the scores are neither.
    """
    if scores is None:
        return []
    if isinstance(scores, Mapping):
        return [(str(name), str(value)) for name, value in scores.items()]
    if not hasattr(scores, "per_datum"):
        raise TypeError(
            "scores must be an Evaluation, what pyro_vae.evaluate returns, or a dict of names and values; "
            f"got {type(scores).__name__}"
        )
    unit = f"nats per datum, {scores.num_data:,} data"
    rows = [(text, f"{scores.mean(name)} {unit}") for name, text in _SCORES.items()]
    if scores.is_discrete:
        rows.append(("bits per dimension", str(scores.bits_per_dimension)))
    rows.append(("active latent dimensions", f"{scores.active_units} of {len(scores.unit_names)}"))
    rows.append(("unreliable estimates", f"{scores.unreliable:.1%} of the data (k̂ > 0.7)"))
    return rows


def describe_versions(packages: Sequence[str] = ("pyro_vae", "pyro-ppl", "torch")) -> str:
    """Return the versions of packages."""
    return ", ".join(f"{package} {version(package)}" for package in packages)
