"""Data that are not one tensor in memory: every container gives the run that the tensor gives."""

import random
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.data import batches as batches_module
from pyro_vae.data import sources
from pyro_vae.data.batches import Batches
from pyro_vae.data.permutations import permutation
from pyro_vae.utils.isolation import derived_seed
from pyro_vae.utils.serialization import CheckpointError

N, D = 37, 5
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


class Items(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index]


class Batched(Items):
    def __getitems__(self, indices):
        return [X[index] for index in indices]


def memory_map(folder):
    np.save(folder / "x.npy", X.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


CONTAINERS = {
    "numpy": lambda folder: X.numpy(),
    "numpy, float64": lambda folder: X.numpy().astype(np.float64),
    "numpy, other byte order": lambda folder: X.numpy().astype(">f4"),
    "numpy, reversed": lambda folder: np.ascontiguousarray(X.numpy()[::-1])[::-1],
    "memory map": memory_map,
    "h5py": lambda folder: h5py.File(folder / "x.h5", "w").create_dataset("x", data=X.numpy()),
    "sparse": lambda folder: scipy.sparse.csr_matrix(X.numpy()),
    "data frame": lambda folder: pd.DataFrame(X.numpy(), columns=list("abcde")),
    "dataset": lambda folder: Items(),
    "dataset by batches": lambda folder: Batched(),
    "tensor dataset": lambda folder: TensorDataset(X),
}


def make():
    torch.manual_seed(1)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (D,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((D,), 2, hidden_features=(4,)),
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_trains_and_evaluates_as_the_tensor(tmp_path, container):
    data = CONTAINERS[container](tmp_path)
    runs = []
    for x in (X, data):
        vae = make()
        options = {"epochs": 2, "batch_size": 8, "validation": 0.2, "progress": False}
        history = pv.fit(vae, x, **options)
        report = pv.evaluate(vae, x, num_particles=5, progress=False)
        runs.append((history.column("validation_elbo"), report.log_evidence, list(vae.parameters())))
    assert runs[0][:2] == runs[1][:2]
    assert all(map(torch.equal, runs[0][2], runs[1][2]))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_run_resumes_from_another_container(tmp_path, container):
    options = {"batch_size": 8, "progress": False, "checkpoint_dir": tmp_path / "run", "resume": True}
    pv.fit(make(), X, epochs=1, **options)
    vae = make()
    assert len(pv.fit(vae, CONTAINERS[container](tmp_path), epochs=2, **options)) == 2


def test_what_has_no_rows_by_position_raises_with_what_works():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X)

    for data, message in [
        ([[1.0, 2.0]], "got list: convert with torch.as_tensor"),
        ((X, X), "a VAE takes x alone; got 2 arguments, a tuple"),
        (TensorDataset(X, X), "a VAE takes x alone; got 2 arguments, a tuple"),
        (pd.DataFrame({"a": ["x", "y"]}), r"must be numbers; got the column 'a' \(.*\): .*data.table"),
    ]:
        with pytest.raises(TypeError, match=message):
            pv.fit(make(), data, epochs=1, progress=False)
    for data, message in [  # which fit takes as batches
        (DataLoader(TensorDataset(X)), r"DataLoader: pass its dataset \(loader.dataset\)"),
        (Stream(), "return rows by position .* got Stream"),
        ((row for row in X), "return rows by position .* got generator"),
    ]:
        with pytest.raises(TypeError, match=message):
            pv.evaluate(make(), data, progress=False)
    assert pv.fit(make(), DataLoader(TensorDataset(X)).dataset, epochs=1, progress=False)


def test_a_validation_of_zero_holds_nothing_out():
    history = pv.fit(make(), X, validation=0, epochs=1, progress=False)
    assert np.isnan(history[0].validation_elbo)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1003])
def test_a_long_order_takes_each_row_once(size):
    order = permutation(size, seed=3, in_memory=0)
    rows = order(torch.arange(size))
    assert torch.equal(rows.sort().values, torch.arange(size))
    assert torch.equal(order(torch.arange(size // 2, size)), rows[size // 2 :])  # at any position at once


def test_a_long_order_is_random():
    size = 100_003
    rows = permutation(size, seed=3, in_memory=0)(torch.arange(size)).double()
    other = permutation(size, seed=4, in_memory=0)(torch.arange(size)).double()
    for one, two in ((rows[:-1], rows[1:]), (rows, torch.arange(size)), (rows, other)):
        correlation = torch.corrcoef(torch.stack([one, two.double()]))[0, 1]
        assert abs(correlation) < 5 / size**0.5


@pytest.fixture
def _all_are_large(monkeypatch):
    monkeypatch.setattr(sources, "CHECKED_IN_FULL", 0)


@pytest.mark.usefixtures("_all_are_large")
def test_reading_ahead_gives_the_same_batches(tmp_path):
    ahead = list(Batches(X, seed=2).epoch(1, batch_size=6))
    order = permutation(N, derived_seed(2, batches_module._ORDER, 1))
    assert all(map(torch.equal, ahead, X[order(torch.arange(N))].split(Batches(X).lengths(6))))


@pytest.mark.usefixtures("_all_are_large")
def test_an_error_while_reading_ahead_is_raised_here():
    class Broken(Items):
        def __getitem__(self, index):
            if index == 30:
                raise OSError("row 30 cannot be read")
            return X[index]

    with pytest.raises(OSError, match="row 30"):
        list(Batches(Broken()).in_order(4))


def test_a_wrong_value_is_named_by_its_row_in_all_the_data(monkeypatch):
    monkeypatch.setattr(batches_module, "_CHUNK", 4)
    for row in (2, 22):
        spoilt = X.clone()
        spoilt[row, 1] = torch.nan
        where = f"{'the first ' * (row == 2)}4 of the {len(X)} rows"
        message = rf"^x\[{row}, 1\] = nan .*; 1 of {4 * X.shape[1]} values do in {where}"
        with pytest.raises(ValueError, match=message):
            pv.fit(make(), spoilt, epochs=1, batch_size=8, progress=False)
        with pytest.raises(ValueError, match=rf"the validation data: x\[{row + 31}, 1\] = nan"):
            pv.fit(make(), X, validation=torch.cat([X[:31], spoilt[: row + 1]]), epochs=1, progress=False)
        message = rf"x\[{row}, 1\] = nan .*values do in \d of the {len(X)} rows"
        with pytest.raises(ValueError, match=message):  # of a part in random order
            pv.fit(make(), spoilt, validation=0.3, epochs=1, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"x\[22, 1\] = nan .*; 1 of {X.numel()} values do; if"):
        pv.fit(make(), spoilt, epochs=1, progress=False)


@pytest.mark.usefixtures("_all_are_large")
def test_large_data_are_checked_when_they_are_first_read(monkeypatch):
    monkeypatch.setattr(batches_module, "_CHUNK", 4)
    spoilt = X.clone()
    spoilt[20, 1] = torch.nan
    with pytest.raises(ValueError, match=rf"x\[20, 1\] = nan .*values do in 8 of the {len(X)} rows"):
        pv.fit(make(), spoilt, epochs=1, batch_size=8, progress=False)


@pytest.mark.usefixtures("_all_are_large")
def test_the_fingerprint_of_large_data_tells_a_changed_block(monkeypatch):
    monkeypatch.setattr(sources, "_BLOCKS", 37)
    found = [Batches(data).describe() for data in (X, X.clone(), X[:-1], X + 1)]
    assert found[0] == found[1]
    assert len({str(each) for each in found}) == 3


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 330 MB goes through fit with validation and checkpoints, and part of it through evaluate."""
    rows, width = 80_000, 1024
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, width))  # of zeros, sparse
    file[:: rows // 100] = 1.0
    del file
    code = f"""
        import resource, numpy as np, torch, pyro_vae as pv
        from pyro_vae.data import sources
        torch.set_num_threads(1)
        sources.CHECKED_IN_FULL = 2**24  # as if a large file began at 16 MB
        vae = pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=pv.likelihoods.Normal(2, ({width},),
            hidden_features=(4,)), guide=pv.guides.DiagonalNormal(({width},), 2, hidden_features=(4,)))
        x = np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r")
        torch.optim.Adam(vae.parameters())  # the first one imports what takes memory
        used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 265 * 2**20,) * 2)
        pv.fit(vae, x, epochs=1, batch_size=1024, validation=0.3, engine="eager", progress=False,
            checkpoint_dir={str(tmp_path / "run")!r})
        print(pv.evaluate(vae, x[:5_000], num_particles=2, progress=False).num_data)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.stdout.strip() == "5000", run.stderr[-2000:]


class Augmented(Items):
    """Transforms that draw from torch, NumPy and Python, as people's do."""

    def __getitem__(self, index):
        noise = torch.randn(D) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return X[index] + 0.1 * noise


def test_random_transforms_are_functions_of_the_batch(tmp_path):
    options = {"batch_size": 8, "validation": 0.2, "progress": False}
    whole, resumed = make(), make()
    history = pv.fit(whole, Augmented(), epochs=3, **options)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    for epochs in (1, 3):
        again = pv.fit(resumed, Augmented(), epochs=epochs, checkpoint_dir=tmp_path, resume=True, **options)
    assert again.column("validation_elbo") == history.column("validation_elbo")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    batches = list(Batches(Augmented()).epoch(0, batch_size=8))
    assert not torch.equal(batches[0], next(iter(Batches(Augmented()).epoch(1, batch_size=8))))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_nothing_is_read_before_it_is_needed(monkeypatch):
    """Of a large source the check reads one chunk, and a first look its examples alone."""
    monkeypatch.setattr(sources, "CHECKED_IN_FULL", 0)
    monkeypatch.setattr(batches_module, "_CHUNK", 4)
    read = []

    class Counted(Items):
        def __getitem__(self, index):
            read.append(index)
            return X[index]

    batches = Batches(Counted())
    read.clear()
    batches.check(lambda x: None)
    assert read == [0, 1, 2, 3]
    batches.peek(2)
    assert read == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("mode", ["dynamic", "threshold"])
def test_grey_levels_outside_the_unit_interval_raise(mode):
    with pytest.raises(ValueError, match="needs grey levels in"):
        Batches(X, binarize=mode).check(lambda x: None)


class Stored:
    """An array that a file stores in chunks of four rows, and that counts how often each is read."""

    chunks = (4, D)

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.reads = values, values.shape, values.dtype, []

    def __getitem__(self, index):
        assert isinstance(index, slice), "single rows would each cost a chunk"
        self.reads.append(index.start // 4)
        return self.values[index]


@pytest.mark.usefixtures("_all_are_large")
def test_a_large_file_in_chunks_is_read_by_chunks(monkeypatch):
    monkeypatch.setattr(sources, "_MIXED_BYTES", 2 * 4 * D * 4)
    monkeypatch.setattr(sources, "_LEAST_MIXED", 2)
    file = Stored(X.numpy())
    batches = Batches(file, seed=2)
    rows = torch.cat(list(batches.epoch(1, batch_size=6)))
    assert rows[:, 0].sort().values.equal(X[:, 0].sort().values)
    assert not rows.equal(X)
    assert len(file.reads) < 2 * N / 4
    train, held_out = Batches(file, seed=2).split(0.3)
    file.reads.clear()
    parts = [torch.cat(list(train.epoch(1, batch_size=6))), torch.cat(list(held_out.in_order(5)))]
    assert torch.cat(parts)[:, 0].sort().values.equal(X[:, 0].sort().values)
    assert len(file.reads) < 5 * N / 4
    assert torch.cat(list(Batches(file).in_order(7))).equal(X)


@pytest.mark.usefixtures("_all_are_large")
def test_a_run_on_a_file_in_chunks_resumes_to_the_bit(tmp_path):
    options = {"batch_size": 8, "validation": 0.2, "progress": False, "checkpoint_dir": tmp_path / "run"}
    file = h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=X.numpy(), chunks=(3, D))
    whole, resumed = make(), make()
    pv.fit(whole, file, epochs=3, **(options | {"checkpoint_dir": None}))
    pv.fit(make(), file, epochs=1, **options)
    pv.fit(resumed, file, epochs=3, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="chunks"):
        pv.fit(make(), X, epochs=3, resume=True, **options)


@pytest.mark.usefixtures("_all_are_large")
def test_chunks_that_are_not_numbers_of_rows_or_too_large_to_mix(monkeypatch):
    class Lazy(Stored):
        """An array whose `chunks` are a tuple for each dimension, as dask's."""

        chunks = ((4,) * 9 + (1,), (D,))

    assert Batches(Lazy(X.numpy())).source.chunks is None
    monkeypatch.setattr(sources, "_MIXED_BYTES", 4 * 6 * D * 4)  # four runs of six rows

    class OneChunk(Stored):
        chunks = (N, D)

    batches = Batches(OneChunk(X.numpy()))
    assert batches.source.chunks == (6, 4)
    assert torch.cat(list(batches.in_order(5))).equal(X)


@pytest.mark.parametrize("checked_in_full", [0, 2**30])
def test_a_run_on_images_in_a_file_is_that_on_images_in_memory(checked_in_full, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHECKED_IN_FULL", checked_in_full)
    levels = np.random.default_rng(0).integers(0, 256, (31, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "levels.npy", levels)
    runs = []
    for array in (levels, np.load(tmp_path / "levels.npy", mmap_mode="r")):
        torch.manual_seed(0)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Bernoulli(2, (1, 4, 3), hidden_features=(5,)),
            guide=pv.guides.DiagonalNormal((1, 4, 3), 2, hidden_features=(5,)),
        )
        images = pv.data.from_array(array)
        history = pv.fit(
            vae, images, binarize="dynamic", epochs=2, batch_size=8, validation=0.2, progress=False
        )
        runs.append([*history.column("train_bound"), *history.column("validation_elbo")])
    assert runs[0] == runs[1]
