"""A VAE for other programs: encoder and decoder as programs of torch alone, weights as safetensors."""

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.utils.isolation import evaluating
from pyro_vae.utils.serialization import replacing
from pyro_vae.vae import VAE, require_vae

__all__ = ["export", "export_weights"]

_ROWS = 3  # of the check


def export(vae: VAE, folder: str | os.PathLike[str]) -> None:
    """Write encoder and decoder of a VAE, in evaluation mode, as programs of `torch.export`.

    | file | program |
    |---|---|
    | `encoder.pt2` | x (N, *event_shape) to "mean" and "standard_deviation" of q(z|x), (N, K) each |
    | `decoder.pt2` | z (N, K) to "mean", E[x|z], (N, *event_shape) |
    | `programs.json` | shapes and dtypes of both |

    N is free. `torch.export.load("encoder.pt2").module()(x)` runs one; it needs torch, and neither Pyro nor
    this package. Each file is loaded and compared with the VAE before this function returns.

    Args:
        vae: A VAE whose guide has a mean and a standard deviation.
        folder: Made if it does not exist; earlier files of these names are replaced.

    Raises:
        TypeError: If `vae` is not a VAE of x alone.
        ValueError: If q(z|x) or p(x|z) has no mean, the guide is a function, or it refines itself, which
            needs gradients.

    Example:
        >>> import tempfile
        >>> from pyro_vae import guides, likelihoods, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Normal(2, (6,)),
        ...     guide=guides.DiagonalNormal((6,), 2),
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> export(vae, folder)
        >>> program = torch.export.load(f"{folder}/decoder.pt2").module()
        >>> program(torch.zeros(7, 2))["mean"].shape
        torch.Size([7, 6])
    """
    require_vae("export", vae)
    if not isinstance(vae.posterior, nn.Module):
        raise ValueError(
            "the guide is a Pyro function, which draws: export a VAE whose guide is a module that returns "
            "q(z|x), vae.with_guide(module)"
        )
    if getattr(vae.posterior, "needs_log_joint", False):
        raise ValueError(
            f"a {type(vae.posterior).__name__} guide takes gradient steps, which no program of torch.export "
            "does: export a VAE with the guide that it refines, vae.with_guide(vae.posterior.guide)"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parameter = next(vae.parameters(), torch.zeros(()))
    described: dict[str, Any] = {}
    with evaluating(vae, parameter.device, 0):
        z = vae.prior().sample((_ROWS,))
        x = vae.decode(z).sample()
        programs = [("encoder", _Encoder(vae), "x", x), ("decoder", _Decoder(vae), "z", z)]
        for name, module, argument, value in programs:
            _require_mean(name, vae, x, z)
            outputs = _write(module, value, path / f"{name}.pt2")
            described[name] = {"input": {argument: _shape(value)}, "output": outputs}
    with replacing(path / "programs.json") as partial:
        partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def export_weights(vae: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a VAE to a file of safetensors, which many programs read.

    The tensors have the names of `vae.state_dict()`, and their shapes and dtypes; the metadata "model" is the
    class of the VAE. `vae.load_state_dict(safetensors.torch.load_file(path))` reads them back. `VAE.save`
    also keeps how the VAE was built.

    Args:
        vae: A VAE, or any module whose state is tensors.
        path: The file, such as "vae.safetensors"; an earlier one is replaced when it is complete.

    Raises:
        ImportError: If safetensors is not installed: `pip install "pyro_vae[safetensors]"`.
        TypeError: If `vae` is not a module, or its state holds other things than tensors.
        OSError: If the file cannot be written; an earlier one is unchanged.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> layer = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_weights(layer, f"{folder}/layer.safetensors")
        ...     {name: tuple(value.shape) for name, value in load_file(f"{folder}/layer.safetensors").items()}
        {'bias': (2,), 'weight': (2, 3)}
    """
    if not isinstance(vae, nn.Module):
        raise TypeError(f"export_weights takes a pyro_vae.VAE or another module; got {type(vae).__name__}")
    state = vae.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} of the state is a {type(value).__name__}, and safetensors hold tensors alone: "
                "keep it elsewhere"
            )
    # copies, as the format takes no tensors that share memory
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    write = _safetensors().save_file
    with replacing(path) as partial:
        write(tensors, partial, metadata={"format": "pt", "model": type(vae).__name__})


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            'weights as safetensors need the package: pip install "pyro_vae[safetensors]"'
        ) from error


class _Encoder(nn.Module):
    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return mean and standard deviation of q(z|x)."""
        q = self.vae.posterior(x)
        return {"mean": q.mean, "standard_deviation": q.stddev}


class _Decoder(nn.Module):
    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Return E[x|z]."""
        return {"mean": self.vae.likelihood(z).mean}


def _require_mean(name: str, vae: VAE, x: Tensor, z: Tensor) -> None:
    what, p = ("guide", vae.encode(x)) if name == "encoder" else ("likelihood", vae.decode(z))
    try:
        finite = bool(p.mean.isfinite().all() and p.stddev.isfinite().all())
    except NotImplementedError:
        finite = False
    if not finite:
        part = vae.posterior if what == "guide" else vae.likelihood
        raise ValueError(
            f"the {what}, a {type(part).__name__}, has no mean and standard deviation in closed form, which "
            f"are what the {name} returns: use another {what}, or torch.export with what you need"
        )


def _write(module: nn.Module, value: Tensor, path: Path) -> dict[str, Any]:
    """Export a module, compare what was written with it, and return the shapes of its outputs."""
    rows = torch.export.Dim("N", min=1, max=2**31 - 1)
    program = torch.export.export(module, (value,), dynamic_shapes=({0: rows},))
    with replacing(path) as partial:
        with partial.open("wb") as file:
            torch.export.save(program, file)
        with partial.open("rb") as file:
            read = torch.export.load(file).module()
        for part in (value, value[:1], torch.cat([value, value])):
            expected, found = module(part), read(part)
            for name, tensor in expected.items():
                tolerance = 16 * math.sqrt(torch.finfo(tensor.dtype).eps) * (1 + tensor.abs().max())
                if not ((found[name] - tensor).abs() <= tolerance).all():
                    raise ValueError(
                        f"the exported program does not compute what the VAE does: its {name} differs by up "
                        f"to {float((found[name] - tensor).abs().max()):.3g}. A part may depend on Python "
                        "values that change, or draw random numbers"
                    )
    return {name: _shape(tensor) for name, tensor in expected.items()}


def _shape(tensor: Tensor) -> dict[str, Any]:
    return {"shape": ["N", *tensor.shape[1:]], "dtype": str(tensor.dtype).removeprefix("torch.")}
