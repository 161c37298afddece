"""DataLoaders and streams as the data of a fit."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from training_run import normal_vae

import pyro_vae as pv
from pyro_vae.data.streams import Stream
from pyro_vae.utils.isolation import derived_seed, seed_at, seed_generators
from pyro_vae.utils.processes import Processes

DATA = torch.randn(45, 4, generator=torch.Generator().manual_seed(1))


class Noisy(Dataset):
    """Rows with noise from each of the generators that a transform may use."""

    def __init__(self, seen=None):
        self.seen = [] if seen is None else seen

    def __len__(self):
        return len(DATA)

    def __getitem__(self, position):
        self.seen.append(position)
        return DATA[position] + 0.1 * (torch.randn(4) + np.random.normal())  # noqa: NPY002


class Numbers(IterableDataset):
    """A stream of batches without end, or of `count`."""

    def __init__(self, count=None):
        self.count = count

    def __iter__(self):
        for number in itertools.count() if self.count is None else range(self.count):
            yield DATA[(number * 5 + torch.arange(5)) % 45]


class Stateful(Numbers):
    """A stream that knows where it is."""

    position = 0

    def __iter__(self):
        while True:
            yield next(self)

    def __next__(self):
        self.position += 1
        return DATA[((self.position - 1) * 5 + torch.arange(5)) % 45]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Itself(Stateful):
    """One that is its own iterator."""

    def __iter__(self):
        return self


def fit(data, **options):
    vae = normal_vae()
    defaults = {"epochs": 3, "progress": False, "engine": "eager"}
    history = pv.fit(vae, data, **(defaults | options))
    return torch.nn.utils.parameters_to_vector(vae.parameters()).detach(), history


def test_a_loader_in_order_trains_as_its_batches_do():
    vae = normal_vae()
    svi = pv.SVI(vae, torch.optim.SGD(vae.parameters(), 1e-3), pv.IWAE(2), engine="eager")
    pv.fit(
        other := normal_vae(),
        DataLoader(DATA, batch_size=10),
        epochs=1,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3),
        estimator=pv.IWAE(2),
        engine="eager",
        progress=False,
    )
    for step, batch in enumerate(DATA.split(10)):
        seed_generators(batch.device, seed_at(derived_seed(0, 20, 0), step))  # the noise of fit
        svi.step(batch)
    for mine, theirs in zip(vae.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shuffled_loader_is_a_function_of_the_seed_and_resumes_to_the_bit(tmp_path, workers):
    def loader(seen=None):
        return DataLoader(Noisy(seen), batch_size=7, shuffle=True, num_workers=workers)

    torch.manual_seed(1)
    whole, _ = fit(loader(), seed=4)
    torch.manual_seed(2)
    first, second = [], []
    fit(loader(first), seed=4, checkpoint_dir=tmp_path, epochs=1)
    resumed, _ = fit(loader(second), seed=4, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(whole, resumed)
    other, _ = fit(loader(), seed=5)
    assert not torch.equal(whole, other)
    if workers == 0:
        passes = [sorted(second[7 + start : 7 + start + 45]) for start in (0, 45)]  # 7 were looked at before
        assert passes == [list(range(45))] * 2


def test_within_an_epoch_it_resumes_to_the_bit_too(tmp_path):
    class Interrupted(Noisy):
        reads = 0

        def __getitem__(self, position):
            self.reads += 1
            if self.reads == 70:
                raise RuntimeError("stopped")
            return super().__getitem__(position)

    def loader(rows):
        return DataLoader(rows, batch_size=7, shuffle=True)

    whole, _ = fit(loader(Noisy()))
    with pytest.raises(RuntimeError, match="stopped"):
        fit(loader(Interrupted()), checkpoint_dir=tmp_path)
    resumed, _ = fit(loader(Noisy()), checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(whole, resumed)


def test_a_stream_without_end_goes_on_from_epoch_to_epoch():
    seen = []

    class Watched(Numbers):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch)
                yield batch

    _, history = fit(Watched(), steps_per_epoch=4)
    assert len(history) == 3
    assert torch.equal(torch.stack(seen), torch.stack(list(itertools.islice(Numbers(), 12))))


def test_a_short_stream_begins_again():
    endless, _ = fit(Numbers(), steps_per_epoch=9)  # 9 batches are all data, in order
    short, _ = fit(Numbers(9), steps_per_epoch=9)
    assert torch.equal(endless, short)


def test_an_iterator_is_read_once():
    whole, _ = fit(Numbers(), steps_per_epoch=4)
    once, _ = fit(iter(Numbers(12)), steps_per_epoch=4)
    assert torch.equal(whole, once)
    with pytest.raises(ValueError, match="has ended, and gives no batch again"):
        fit(iter(Numbers(11)), steps_per_epoch=4)


@pytest.mark.parametrize("stream", [Stateful, Itself])
def test_a_stream_with_a_state_resumes_to_the_bit(tmp_path, stream):
    whole, _ = fit(stream(), steps_per_epoch=4)
    assert torch.equal(whole, fit(Numbers(), steps_per_epoch=4)[0])  # and no batch is left out
    fit(stream(), steps_per_epoch=4, epochs=2, checkpoint_dir=tmp_path)
    resumed, _ = fit(stream(), steps_per_epoch=4, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("stream", [Numbers, lambda: iter(Numbers())])
def test_one_without_says_that_it_begins_again(tmp_path, caplog, stream):
    fit(stream(), steps_per_epoch=4, epochs=2, checkpoint_dir=tmp_path)
    assert not caplog.records
    _, history = fit(stream(), steps_per_epoch=4, checkpoint_dir=tmp_path, resume=True)
    assert len(history) == 3
    assert f"{type(stream()).__name__} begins again from its start" in caplog.text


def test_a_loader_with_a_generator_of_its_own_resumes_to_the_bit(tmp_path):
    def loader(seed):
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(DATA, batch_size=7, shuffle=True, generator=generator)

    whole, _ = fit(loader(3))
    one = loader(3)
    fit(one, epochs=2, checkpoint_dir=tmp_path)
    resumed, _ = fit(one, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, fit(loader(4))[0])
    assert torch.equal(one.generator.get_state(), loader(3).generator.get_state())


def test_a_sampler_knows_the_number_of_each_pass():
    class Counted(torch.utils.data.SequentialSampler):
        def set_epoch(self, number):
            numbers.append(number)

    numbers = []
    fit(DataLoader(DATA, batch_size=9, sampler=Counted(DATA)))
    assert numbers == [0, 0, 1, 2]  # the first batch is looked at before
    numbers.clear()
    fit(DataLoader(DATA, batch_size=9, sampler=Counted(DATA)), steps_per_epoch=4)
    assert numbers == [0, 1, 2]


def test_batches_may_have_any_length_and_several_arguments():
    def model_data():
        return [[DATA[:20].double(), torch.arange(20) % 3], [DATA[20:25].double(), torch.zeros(5).long()]]

    torch.manual_seed(1)
    cvae = pv.ConditionalVAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (4,), context_dim=3),
        guide=pv.guides.DiagonalNormal((4,), 2, context_dim=3),
    )
    loader = DataLoader(model_data(), batch_size=None)
    history = pv.fit(cvae, loader, epochs=1, progress=False)
    weights, bounds = torch.tensor([20.0, 5.0]), torch.tensor([history[0].train_bound])
    assert bounds.isfinite().all()
    assert weights.sum() == 25


def test_validation_by_a_loader_is_that_of_its_rows():
    by_rows = fit(DATA, validation=DATA[:20])[1]
    by_loader = fit(DataLoader(DATA, batch_size=9), validation=DataLoader(DATA[:20], batch_size=20))[1]
    assert by_loader[0].validation_elbo == pytest.approx(by_rows[0].validation_elbo, abs=2)


def test_missing_values_of_a_stream():
    x = DATA.clone()
    x[::3, 1] = torch.nan
    _, history = fit(DataLoader(x, batch_size=9), missing="nan", epochs=1)
    assert history[0].train_bound > -100
    with pytest.raises(ValueError, match="NaN|nan"):
        fit(DataLoader(x, batch_size=9), epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "batch_size goes with data that are taken by position"),
        ({"binarize": "dynamic"}, "binarize goes with data that are taken by position"),
        ({"validation": 0.2}, "an iterable has no part to hold out"),
        ({"shards": 3}, "are not cut in shards"),
    ],
)
def test_what_an_iterable_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(DataLoader(DATA, batch_size=9), **options)


def test_what_gives_no_batches_is_refused():
    with pytest.raises(ValueError, match="data without a length need steps_per_epoch"):
        fit(Numbers())
    with pytest.raises(ValueError, match="data without a length need steps_per_epoch"):
        fit(DataLoader(Numbers(), batch_size=None))
    with pytest.raises(ValueError, match="validation data must have a length"):
        fit(Numbers(), steps_per_epoch=3, validation=iter(DATA.split(9)))
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1"):
        fit(Numbers(), steps_per_epoch=0)
    with pytest.raises(ValueError, match="gives no batch"):
        fit(Numbers(0), steps_per_epoch=3)
    with pytest.raises(ValueError, match="steps_per_epoch is for an iterable"):
        fit(DATA, steps_per_epoch=3)
    wrong = DATA.clone()
    wrong[41, 2] = torch.inf
    with pytest.raises(
        ValueError, match=r"x\[5, 2\] = inf lies .* \(in batch 4 of the epoch; it is row 41 of the epoch, "
    ):
        fit(DataLoader(wrong, batch_size=9), epochs=1)
    wrong[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"x\[3, 1\] = inf .* \(in batch 0 of the epoch; it is row 3 of"):
        fit(DataLoader(wrong, batch_size=9), epochs=1)


def test_the_row_of_a_wrong_value_counts_the_batches_before_it():
    wrong = DATA.clone()
    wrong[41, 2] = torch.inf

    def noting(batch):
        if batch.isinf().any():
            raise ValueError(f"x[{int(batch.isinf().nonzero()[0, 0])}] is wrong")

    for start, place in (
        (0, "batch 4 of the epoch; it is row 41 of"),
        (3, "batch 4 of the epoch; it is row 41"),
    ):
        stream = Stream(DataLoader(wrong, batch_size=9), None, seed=0)
        stream.check(noting)
        with pytest.raises(ValueError, match=rf"x\[5\] is wrong \(in {place}"):
            list(stream.epoch(0, batch_size=9, start=start))
        with pytest.raises(ValueError, match=rf"x\[5\] is wrong \(in {place}"):
            list(stream.in_order(9, first=1, every=3))
    endless = Stream(iter(wrong.split(9)), 9, seed=0)
    endless.check(noting)
    with pytest.raises(ValueError, match=r"x\[5\] is wrong \(in batch 6 of the epoch, counted from 0\)"):
        list(endless.epoch(0, batch_size=9, start=2))  # resumed, so that batches before it are not known


def test_batches_may_be_arrays_and_data_frames():
    class Converted(Numbers):
        def __init__(self, convert):
            super().__init__(9)
            self.convert = convert

        def __len__(self):
            return 9

        def __iter__(self):
            return map(self.convert, super().__iter__())

    def frame(x):
        return pd.DataFrame(x.numpy().astype(np.float64))

    expected, history = fit(Converted(lambda x: x), validation=Converted(lambda x: x))
    for convert in (lambda x: x.numpy(), lambda x: x.double().numpy(), frame, lambda x: [frame(x)]):
        found, same = fit(Converted(convert), validation=Converted(convert))
        assert torch.equal(found, expected)
        assert same.column("validation_elbo") == history.column("validation_elbo")
    stream = Stream(iter([(DATA.numpy(), np.array(["a"] * 45), None)]), 1, seed=0)
    assert [type(part) for part in next(stream.epoch(0, batch_size=1))] == [
        torch.Tensor,
        np.ndarray,
        type(None),
    ]
    for text in ("a", np.array(["a"])):
        with pytest.raises(TypeError, match="a batch must be a tensor, array or data frame of numbers"):
            fit(iter([text]), steps_per_epoch=1)


class Two(Processes):
    """Stands for two processes that do the same."""

    def __init__(self):
        super().__init__(None)
        self.size = 2

    def gather(self, function):
        return [function()] * 2


class Halves(torch.utils.data.Sampler):
    """A user's own sampler of batches, which might divide the data."""

    def __iter__(self):
        yield from ([0, 1, 2], [3, 4])

    def __len__(self):
        return 2


def test_processes_that_begin_with_the_same_batch_are_warned_of(caplog):
    Stream(DataLoader(DATA, batch_sampler=Halves()), None, seed=0, processes=Two())
    assert "processes begin with the same batch" in caplog.text
    caplog.clear()
    Stream(DataLoader(DATA, batch_sampler=Halves()), None, seed=0)
    assert not caplog.records


def test_a_loader_of_all_data_is_refused_where_processes_divide_them():
    sampler = torch.utils.data.SubsetRandomSampler(range(45))
    for options in ({}, {"shuffle": True}, {"sampler": sampler}, {"sampler": sampler, "batch_size": None}):
        with pytest.raises(ValueError, match="would give every process the same data"):
            Stream(DataLoader(DATA, **options), None, seed=0, processes=Two())
    for sampler in (
        torch.utils.data.RandomSampler(DATA, replacement=True),
        torch.utils.data.WeightedRandomSampler(torch.ones(45), 45),
        torch.utils.data.DistributedSampler(DATA, num_replicas=2, rank=0),
    ):
        stream = Stream(DataLoader(DATA, batch_size=9, sampler=sampler), None, seed=0, processes=Two())
        assert stream.batch_size == 9
