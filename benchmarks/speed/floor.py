"""Lower bound on the time of a step: its matrix products alone, with operands in each library's best layout.

A linear layer needs the products x Wᵀ, gᵀ x for the gradient of its weight and, except in the encoder's first
layer, g W for the gradient of its input.
"""

from collections.abc import Callable

import jax
import numpy as np
import torch
from cases import Case, Skip
from torch import nn

NAMES = ("floor: MKL", "floor: oneDNN", "floor: XLA")


def products(case: Case) -> list[tuple[int, int, int]]:
    """Return the sizes (M, K, N) of the products (M × K) (K × N) of a step."""
    sizes = []
    for network, rows in zip(case.networks(), (case.batch, case.batch * case.particles), strict=True):
        for module in network:
            if isinstance(module, nn.Linear):
                i, o = module.in_features, module.out_features
                sizes += [(rows, i, o), (o, rows, i), (rows, o, i)]
    del sizes[2]  # the gradient of the data is not needed
    return sizes


def mkl(case: Case) -> Callable[[], object]:
    operands = [(torch.randn(m, k), torch.randn(n, k).T, torch.empty(m, n)) for m, k, n in products(case)]
    return lambda: [torch.mm(a, b, out=out) for a, b, out in operands]


def one_dnn(case: Case) -> Callable[[], object]:
    operands = [(torch.randn(m, k), torch.randn(n, k)) for m, k, n in products(case)]
    multiply = torch.ops.mkldnn._linear_pointwise.default  # a bᵀ
    return lambda: [multiply(a, b, None, "none", [], "") for a, b in operands]


def xla(case: Case) -> Callable[[], object]:
    keys = jax.random.split(jax.random.key(0))
    normal = jax.random.normal
    operands = [(normal(keys[0], (m, k)), normal(keys[1], (k, n))) for m, k, n in products(case)]
    multiply = jax.jit(lambda operands: [a @ b for a, b in operands])
    return lambda: jax.block_until_ready(multiply(operands))


class Peer:
    def __init__(self, name: str, case: Case, pixels: np.ndarray):
        if not case.hidden:
            raise Skip("the floor is measured for perceptrons alone")
        self.multiply = {"MKL": mkl, "oneDNN": one_dnn, "XLA": xla}[name.removeprefix("floor: ")](case)

    def run(self, steps: int, *, ready: bool) -> int:
        if not ready:
            raise Skip("the floor has no data")
        with torch.no_grad():
            for _ in range(steps):
                self.multiply()
        return steps

    def weights(self) -> None:
        return None


make_peer = Peer
