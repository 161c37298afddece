import random
import subprocess
import sys
import zipfile

import pytest
import torch

import pyro_vae as pv
from pyro_vae.utils import serialization

CONTENT = {
    "epoch": 3,
    "rate": 1e-3,
    "name": "run",
    "nothing": None,
    "weights": {"w": torch.linspace(-1, 1, 300).reshape(20, 15), "bits": torch.arange(7, dtype=torch.uint8)},
    "rows": [[1, 2.5], [3, -4.0]],
}


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def test_written_content_is_read(tmp_path):
    serialization.write(tmp_path / "a.pt", "test", CONTENT)
    assert same(serialization.read(tmp_path / "a.pt", "test"), CONTENT)
    assert same(torch.load(tmp_path / "a.pt", weights_only=True)["content"], CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit, or cut, insert, delete or overwrite a range of bytes."""
    position = rng.randrange(len(content))
    length = rng.randrange(1, 65)
    head, tail = content[:position], content[position + length :]
    kind = rng.randrange(5)
    if kind == 0:
        return head + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]
    if kind == 1:
        return head
    if kind == 2:
        return head + rng.randbytes(length) + content[position:]
    return head + tail if kind == 3 else head + rng.randbytes(length) + tail


def check_mutants(path, count, seed):
    serialization.write(path, "test", CONTENT)
    original, rng = path.read_bytes(), random.Random(seed)
    rejected = 0
    for _ in range(count):
        path.write_bytes(mutate(original, rng))
        try:
            content = serialization.read(path, "test")
        except pv.CheckpointError:
            rejected += 1
        else:  # the damage lies between the parts of the archive
            assert same(content, CONTENT)
    assert rejected > 0.8 * count


def test_a_damaged_file_raises_or_has_its_content(tmp_path):
    check_mutants(tmp_path / "a.pt", 100, seed=0)


@pytest.mark.slow
def test_many_damaged_files_raise_or_have_their_content(tmp_path):
    check_mutants(tmp_path / "a.pt", 5000, seed=1)


class Exploit:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    torch.save({"format": "pyro_vae test", "version": 1, "content": Exploit()}, tmp_path / "a.pt")
    with pytest.raises(pv.CheckpointError, match="never code"):
        serialization.read(tmp_path / "a.pt", "test")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [Exploit(), print, torch.nn.Linear(2, 2), {1, 2}, [object()]])
def test_only_plain_values_are_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"content\['a'\].*only tensors and plain values"):
        serialization.write(tmp_path / "a.pt", "test", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_format_raise(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*a\.pt"):
        serialization.read(path, "test")
    serialization.write(path, "other", CONTENT)
    with pytest.raises(pv.CheckpointError, match=r"should hold a 'test' file.*found 'pyro_vae other'"):
        serialization.read(path, "test")
    torch.save([1, 2], path)
    with pytest.raises(pv.CheckpointError, match="found a list that torch.save wrote"):
        serialization.read(path, "test")
    torch.save({"format": "pyro_vae test", "version": 99, "content": {}}, path)
    with pytest.raises(pv.CheckpointError, match="format version 99"):
        serialization.read(path, "test")
    path.write_text("not an archive")
    with pytest.raises(pv.CheckpointError, match="no readable checkpoint"):
        serialization.read(path, "test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(pv.CheckpointError, match="no readable checkpoint"):
        serialization.read(path, "test")


FULL_DISK = """
import resource, signal, sys, torch
from pyro_vae.utils import serialization
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    serialization.write(sys.argv[1], "test", {"w": torch.zeros(100_000)})
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    serialization.write(path, "test", CONTENT)
    script = [sys.executable, "-c", FULL_DISK, str(path)]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    assert f"cannot write the checkpoint {path}" in run.stdout
    assert same(serialization.read(path, "test"), CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*nowhere"):
        serialization.write(tmp_path / "nowhere" / "a.pt", "test", CONTENT)
