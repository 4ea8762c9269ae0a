"""`load` of digits and of IDX files; tests/experiments/test_tfds.py has the other names."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from regjax.experiments import _digits, _idx
from regjax.experiments._data import DataError, load

NAMES = list(_idx._SHAPES)
TRAIN_IMAGES, TRAIN_LABELS, _, TEST_LABELS = NAMES
SHAPES = dict(zip(NAMES, [(6, 28, 28), (6,), (4, 28, 28), (4,)], strict=True))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("REGJAX_DATA", raising=False)


def pairs(images, labels):
    return Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def test_digits_are_scikit_learns_in_a_stratified_split_that_never_changes():
    data = load("digits")
    images, labels = load_digits(return_X_y=True)
    scaled = (15 * images).astype(np.uint8).reshape(-1, 8, 8, 1)
    assert [a.shape for a in data[1:5]] == [(1497, 8, 8, 1), (1497,), (300, 8, 8, 1), (300,)]
    assert [a.dtype for a in data[1:5]] == [np.uint8, np.int32, np.uint8, np.int32]
    found = pairs(data.train_inputs, data.train_targets) + pairs(
        data.test_inputs, data.test_targets
    )
    assert found == pairs(scaled, labels)
    assert abs(np.bincount(data.test_targets) - np.bincount(labels) * 300 / 1797).max() < 1
    assert data.sha256 == hashlib.sha256(b"".join(a.tobytes() for a in data[1:5])).hexdigest()
    assert data.sha256 == "def16d8eeed69360aaeef1ccf59ff10a9820971e0070492eb43c8f4d9c981945"
    assert (data.name, data.num_classes, data.source) == ("digits", 10, "scikit-learn")


@pytest.mark.parametrize("seed", [0, 3])
def test_fewer_examples_are_the_first_of_all(seed):
    everything = load("digits", seed=seed)
    few = load("digits", num_train=10, num_test=7, seed=seed)
    for part, whole, count in zip(few[1:5], everything[1:5], (10, 10, 7, 7), strict=True):
        np.testing.assert_array_equal(part, whole[:count])
    assert few.sha256 != everything.sha256


def test_a_seed_shuffles_images_and_labels_together():
    plain, shuffled = load("digits"), load("digits", seed=3)
    assert pairs(*plain[1:3]) == pairs(*shuffled[1:3])
    assert pairs(*plain[3:5]) == pairs(*shuffled[3:5])
    assert np.any(plain.train_targets != shuffled.train_targets)


def test_impossible_numbers_of_examples():
    with pytest.raises(
        DataError, match="`num_train` must be at most 1497, the examples of digits, got 1498"
    ):
        load("digits", num_train=1498)
    with pytest.raises(
        DataError, match="`num_test` must be at most 300, the examples of digits, got 301"
    ):
        load("digits", num_test=301)
    with pytest.raises(ValueError, match="`num_test` must be at least 1, got 0"):
        load("digits", num_test=0)
    with pytest.raises(TypeError, match="`num_train` must be a Python integer"):
        load("digits", num_train=10.0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"needs scikit-learn: pip install 'regjax\[run\]'"):
        load("digits")


def test_digits_without_their_file(monkeypatch):
    monkeypatch.setattr(_digits, "_FILE", "datasets/none.csv")
    with pytest.raises(DataError, match=r"its file .*none\.csv"):
        load("digits")


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_digits_are_split_as_scikit_learn_does(seed, monkeypatch):
    monkeypatch.setattr(_digits, "_SEED", seed)
    labels = load_digits(return_X_y=True)[1]
    expected = train_test_split(
        np.arange(len(labels)), test_size=300, random_state=seed, stratify=labels
    )
    for found, numbers in zip(_digits._split(labels), expected, strict=True):
        np.testing.assert_array_equal(found, numbers)


def test_reading_digits_imports_no_scikit_learn():
    code = (
        "import sys; from regjax.experiments import load; load('digits'); "
        "sys.exit('sklearn' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not _idx._DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is missing"
)
def test_fashion_mnist_from_debians_folder():
    data = load("fashion_mnist", num_test=100)
    with gzip.open(_idx._DEBIAN_FOLDER / f"{TRAIN_IMAGES}.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(60000, 28, 28, 1)
    with gzip.open(_idx._DEBIAN_FOLDER / f"{TEST_LABELS}.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    np.testing.assert_array_equal(data.train_inputs, images)
    np.testing.assert_array_equal(data.test_targets, labels[:100])
    assert np.bincount(data.train_targets).tolist() == [6000] * 10
    assert data.test_inputs.shape == (100, 28, 28, 1)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged or of another"):
        load("mnist", data_dir=_idx._DEBIAN_FOLDER)


@pytest.fixture
def idx(monkeypatch):
    """Contents of four small IDX files; `load` is told that they are the true mnist."""
    random = np.random.default_rng(0)
    arrays = {name: random.integers(0, 10, shape, np.uint8) for name, shape in SHAPES.items()}
    contents = {
        name: struct.pack(f">{a.ndim + 1}I", 0x0800 + a.ndim, *a.shape) + a.tobytes()
        for name, a in arrays.items()
    }
    hashes = tuple(hashlib.sha256(content).hexdigest() for content in contents.values())
    monkeypatch.setattr(_idx, "_SHAPES", SHAPES)
    monkeypatch.setattr(_idx, "_SHA256", {"mnist": hashes})
    return arrays, contents


def write(folder, contents, *, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / f"{name}.gz" if zipped else folder / name
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_plain_and_gzip(idx, tmp_path, zipped):
    arrays, contents = idx
    data = load("mnist", data_dir=write(tmp_path, contents, zipped=zipped))
    for found, expected in zip(data[1:5], arrays.values(), strict=True):
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    assert data.train_inputs.shape == (6, 28, 28, 1)
    assert data.test_targets.dtype == np.int32


def test_folders_are_looked_through_in_order(idx, tmp_path, monkeypatch):
    contents = idx[1]
    given, environment = tmp_path / "given", tmp_path / "environment"
    given.mkdir()
    monkeypatch.setenv("REGJAX_DATA", str(environment))
    for folder in (environment, environment / "mnist", given, given / "mnist"):
        write(folder, contents)
        assert load("mnist", data_dir=given).source == str(folder)


DAMAGES = {  # of content, of the file -> what the message says
    "flipped": (lambda c: c[:-3] + bytes([c[-3] ^ 1]) + c[-2:], None, "SHA-256"),
    "cut": (lambda c: c[:-1], None, r"must hold \d+ bytes .*, got \d+ bytes"),
    "cut in the header": (lambda c: c[:6], None, "got 6 bytes"),
    "empty": (lambda c: b"", None, "is not the IDX file"),
    "too long": (lambda c: c + b"\0", None, r"must hold \d+ bytes .*, got more"),
    "floats": (lambda c: b"\0\0\x0d" + c[3:], None, "starts with 0x00000d0., not 0x0000080"),
    "other count": (lambda c: c[:7] + b"\5" + c[8:], None, r"shape \(6.*, got \(5"),
    "zip flipped": (None, lambda z: z[:-6] + bytes([z[-6] ^ 1]) + z[-5:], "cannot be read.*CRC"),
    "zip cut": (None, lambda z: z[:-12], "is truncated"),
    "no zip": (None, lambda z: b"<html>Not found</html>", "cannot be read.*[Nn]ot a gzipped"),
    "zip garbled": (None, lambda z: z[:10] + b"\xff" * 20, "cannot be read"),
}


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(idx, tmp_path, name, damage):
    contents = idx[1]
    of_content, of_file, message = DAMAGES[damage]
    zipped = of_file is not None
    write(tmp_path, contents, zipped=zipped)
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(of_file(path.read_bytes()) if zipped else of_content(contents[name]))
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", data_dir=tmp_path)
    assert str(caught.value).startswith(f"{path} ")
    assert "Fetch the original file again." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_more_is_read_than_the_file_should_hold(idx, tmp_path, monkeypatch):
    contents = idx[1]
    write(tmp_path, contents, zipped=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(gzip.compress(contents[TRAIN_IMAGES] + bytes(10**8), 1))
    sizes = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda f, n=-1: sizes.append(n) or read(f, n))
    with pytest.raises(DataError, match="got more"):
        load("mnist", data_dir=tmp_path)
    assert sizes == [len(contents[TRAIN_IMAGES]) + 1]


@pytest.mark.parametrize("name", [TRAIN_IMAGES, f"{TRAIN_LABELS}.gz"])
def test_only_files_with_an_end_are_read(idx, tmp_path, name):
    write(tmp_path, idx[1], zipped=name.endswith(".gz"))
    path = tmp_path / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{name} must be a file of data, .* got a named pipe"):
        load("mnist", data_dir=tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name} must be a file of data, .* got a device"):
        load("mnist", data_dir=tmp_path)


def test_missing_files(idx, tmp_path, monkeypatch):
    contents = idx[1]
    with pytest.raises(DataError, match=r"No files of mnist found: put train-images.*--data-dir"):
        load("mnist")
    with pytest.raises(DataError, match=rf"looked in {tmp_path}\)"):
        load("mnist", data_dir=tmp_path)
    write(tmp_path, contents)
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(DataError, match=f"only some of the files of mnist: put {TEST_LABELS} "):
        load("mnist", data_dir=tmp_path)
    (tmp_path / TEST_LABELS).mkdir()
    with pytest.raises(DataError, match=f"{TEST_LABELS} must be a file of data"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load("mnist", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("REGJAX_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere is not a folder"):
        load("mnist", data_dir=tmp_path)


def test_the_message_for_fashion_mnist_names_debians_package(tmp_path, monkeypatch):
    monkeypatch.setattr(_idx, "_DEBIAN_FOLDER", tmp_path)
    with pytest.raises(DataError, match="install Debian's package dataset-fashion-mnist"):
        load("fashion_mnist")
