"""What every test runs under: random numbers of its own, and a guard on process-wide state."""

import gc
from collections.abc import Iterator

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.engine.adam_kernel import AdamKernel

collect_ignore = ["mutate.py"]  # a program, of packages that the tests do not need


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections, which else take half a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter's end collect it, of which compiled libraries complain otherwise."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Seed torch's generator, and fail a test that leaves anything process-wide changed."""

    def state() -> dict[str, object]:
        return {
            "default dtype": torch.get_default_dtype(),
            "gradient mode": torch.is_grad_enabled(),
            "argument validation": torch.distributions.Distribution._validate_args,
            "Pyro validation": pyro.infer.util.is_validation_enabled(),
            "parameter store": sorted(pyro.get_param_store().keys()),
            "effect handlers": len(pyro.poutine.runtime._PYRO_STACK),
        }

    before = state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    assert state() == before


@pytest.fixture
def double() -> Iterator[None]:
    """Compute in float64 by default; for a whole file: `pytestmark = pytest.mark.usefixtures("double")`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def compiler() -> None:
    """Skip a test where there is no C++ compiler; not asked before it runs, which would import torch's."""
    if not AdamKernel.is_available():
        pytest.skip("there is no C++ compiler")


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bundled digits be 500 for training and 125 for tests."""
    load = pv.data.load

    def load_few(dataset: str, **options: object) -> pv.data.Images:
        images = load(dataset, **options)
        return images.subset(torch.arange(len(images)) % 8 == 0) if dataset == "digits" else images

    monkeypatch.setattr(pv.data, "load", load_few)
