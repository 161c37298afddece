"""On what bits in floating point depend: a description of the machine, and one way to call networks."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from pyro_vae.utils.isolation import evaluating, without_autocast
from pyro_vae.vae import VAE

__all__ = ["CPU", "machine", "reproducible"]

CPU = torch.device("cpu")
# settings by which the libraries of torch choose their kernels, besides torch's own
_ONEDNN = ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")
_MKL = ("MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS")
_OPENBLAS = ("OPENBLAS_CORETYPE",)


def machine() -> str:
    """Describe the processor, the libraries and their settings on which the last bits of networks depend.

    Not the number of threads: `reproducible` uses one.

    Example:
        >>> f"torch {torch.__version__}" in machine()
        True
    """
    settings = _ONEDNN + (_MKL if torch.backends.mkl.is_available() else _OPENBLAS)
    parts = [
        f"{platform.system()} {platform.machine()}",
        _processor(),
        " ".join(platform.libc_ver()),
        f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}",
        "oneDNN" if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "",
        *(f"{name}={os.environ[name]}" for name in settings if name in os.environ),
    ]
    return ", ".join(part for part in parts if part.strip())


@cache
def _processor() -> str:
    """Return the name of the processor, which `platform.processor` leaves out on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@contextmanager
def reproducible(vae: VAE) -> Iterator[None]:
    """Compute in a block on one thread, without gradients and autocast, with a fixed seed.

    Sums are divided among threads, and therefore rounded in another order with another number of them.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with without_autocast(), evaluating(vae, CPU, 0):
            yield
    finally:
        torch.set_num_threads(threads)
