"""Folders of photographs as people have them."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from pyro_vae.data import DataError, load


@pytest.fixture
def pets(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (8, 6), dtype=np.uint8)).save(tmp_path / name / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    "leftover",
    [
        ".ipynb_checkpoints/0.png",
        "cats/.ipynb_checkpoints/0.png",
        "cats/._0.png",
        "__MACOSX/cats/0.png",
        "@eaDir/0.jpg",
    ],
)
def test_what_programs_leave_behind_is_not_data(pets, leftover, caplog):
    (pets / leftover).parent.mkdir(parents=True, exist_ok=True)
    (pets / leftover).write_bytes((pets / "cats" / "0.png").read_bytes())
    images = load(pets)
    assert (len(images), images.labels.tolist()) == (2, [0, 1])
    assert "1 images in hidden files or folders" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    upright = np.arange(15, dtype=np.uint8).reshape(3, 5)
    undo = {  # from the upright image to the stored one
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.T, 2),
        8: lambda a: np.rot90(a, -1),
    }
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "0.png", exif=tag)
    assert (load(tmp_path).pixels[0, 0].numpy() == upright).all()


def test_size_covers_and_crops(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.T.copy()).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png is \(1, 30, 10\) but a.png is \(1, 10, 30\).*size="):
        load(tmp_path)
    images = load(tmp_path, size=10)
    assert images.pixels.shape == (2, 1, 10, 10)
    assert (images.pixels == 200).all()
    assert load(tmp_path, size=(4, 6)).pixels.shape == (2, 1, 4, 6)


def test_mode_converts_what_is_mixed(tmp_path):
    grey = np.full((4, 6), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png is \(3, 4, 6\) but a.png is \(1, 4, 6\).*mode="):
        load(tmp_path)
    assert (load(tmp_path, mode="L").pixels == 100).all()
    assert load(tmp_path, mode="RGB").pixels.shape == (2, 3, 4, 6)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert load(tmp_path, mode="L").pixels.flatten().tolist() == [0, 7, 255]


def test_transparency_lies_over_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load(tmp_path, mode="RGB").pixels[0, :, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_train_and_test_folders_are_splits(pets):
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            (pets / "set" / split / "cats").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 6), np.uint8)).save(pets / "set" / split / "cats" / f"{number}.png")
    assert (len(load(pets / "set")), len(load(pets / "set", split="test"))) == (3, 2)
    with pytest.raises(DataError, match="has the splits test, train, and not 'val'"):
        load(pets / "set", split="val")
    (pets / "set" / "test").rename(pets / "set" / "val")
    assert (len(load(pets / "set")), len(load(pets / "set", split="val"))) == (3, 2)
    with pytest.raises(DataError, match="has no 'test' split"):
        load(pets, split="test")


def test_a_relative_path_lies_in_root(pets):
    assert len(load(pets.name, root=pets.parent)) == 2


def test_options_of_folders_for_other_data(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4)))
    for name in (tmp_path / "a.npy", "digits"):
        with pytest.raises(DataError, match="size= is for folders of images"):
            load(name, size=8)
    for options in ({"size": 0}, {"size": (3,)}, {"size": 2.5}, {"size": True}, {"mode": "RGBA"}):
        with pytest.raises(DataError, match=rf"{next(iter(options))} must be"):
            load(tmp_path, **options)


def test_a_colour_profile_that_is_not_applied_is_logged(tmp_path, caplog):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png", icc_profile=profile)
    load(tmp_path)
    assert "1 images have a colour profile other than sRGB" in caplog.text
    caplog.clear()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png", icc_profile=profile)
    load(tmp_path)
    assert not caplog.text


def test_a_file_that_may_not_be_read_is_not_called_damaged(pets, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(PermissionError, match="0.png"):
        load(pets)
