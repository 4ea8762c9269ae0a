"""Own arrays as a data set: what they may be, and that they are scaled and trained on as such."""

import dataclasses
import zipfile

import numpy as np
import pytest

from regjax.experiments import (
    DataError,
    TrainSettings,
    _arrays,
    _inputs,
    load,
    scaled_inputs,
    train,
)


def arrays(shape=(4, 4), dtype=np.uint8, **changes):
    random = np.random.default_rng(0)
    draw = lambda n: (200 * random.random((n, *shape))).astype(dtype)
    targets = lambda n: random.integers(3, size=n)
    made = {
        "train_inputs": draw(20), "train_targets": targets(20),
        "test_inputs": draw(7), "test_targets": targets(7),
    }  # fmt: skip
    made["train_targets"][0] = 2
    return {**made, **changes}


def write(path, **options):
    np.savez(path, **arrays(**options))
    return str(path)


@pytest.mark.parametrize(
    ("shape", "image"),
    [((4, 3), (4, 3, 1)), ((4, 3, 2), (4, 3, 2)), ((5,), (1, 1, 5))],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
def test_arrays_come_back_as_images(shape, image, dtype, tmp_path):
    path = write(tmp_path / "own.npz", shape=shape, dtype=dtype)
    dataset, made = load(path), arrays(shape, dtype)
    assert dataset.train_inputs.dtype == dtype
    assert dataset.train_inputs.shape == (20, *image)
    np.testing.assert_array_equal(dataset.train_inputs.ravel(), made["train_inputs"].ravel())
    np.testing.assert_array_equal(dataset.test_targets, made["test_targets"])
    assert dataset.num_classes == 3
    assert len(load(path, num_train=5).train_targets) == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_scaled_inputs_have_mean_0_and_deviation_1_by_channel(dtype, tmp_path, default_promotion):
    dataset = load(write(tmp_path / "own.npz", shape=(4, 4, 2), dtype=dtype))
    train_inputs, test_inputs = scaled_inputs(dataset)
    values = dataset.train_inputs.astype(np.float64)
    mean, deviation = values.mean((0, 1, 2)), values.std((0, 1, 2))
    np.testing.assert_allclose(train_inputs, (values - mean) / deviation, atol=1e-5)
    expected = (dataset.test_inputs.astype(np.float64) - mean) / deviation
    np.testing.assert_allclose(test_inputs, expected, atol=1e-5)
    with pytest.raises(ValueError, match="`dtype` must be float32 without jax_enable_x64"):
        scaled_inputs(dataset, dtype="float64")
    with pytest.raises(TypeError, match="`dataset` must be a Dataset, got ndarray"):
        scaled_inputs(values)


def test_a_constant_channel_is_zero():
    scaling = _inputs.measure_scaling(
        load("digits")._replace(train_inputs=np.full((9, 1, 1, 1), 0.25, np.float32)), "float32"
    )
    assert _inputs.normalize(np.full((2, 1), 0.25, np.float32), scaling).tolist() == [[0], [0]]


def test_features_train_a_perceptron(tmp_path):
    dataset = load(write(tmp_path / "own.npz", shape=(5,), dtype=np.float32))
    settings = TrainSettings(width=3, depth=1, batch_size=5, epochs=1)
    streamed = dataclasses.replace(settings, device_bytes=1)
    results = [
        train(own, dataset, path=tmp_path / name)
        for name, own in (("a", settings), ("b", streamed))
    ]
    assert results[0].losses == results[1].losses
    assert np.isfinite(results[0].losses).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"train_inputs": np.zeros((20, 4, 4), np.int32)},
            "train_inputs of uint8 or of a floating",
        ),
        ({"train_inputs": np.zeros((20, 4, 4), complex)}, "train_inputs of uint8 or .* complex128"),
        ({"test_inputs": np.zeros(7, np.uint8)}, "test_inputs of 2, 3 or 4 axes.* got the shape"),
        ({"test_inputs": np.zeros((0, 4, 4), np.uint8)}, r"none of length 0, got .*\(0, 4, 4\)"),
        ({"train_inputs": np.full((20, 4, 4), np.nan)}, "train_inputs that are finite, got NaN"),
        (
            {"train_inputs": np.full((20, 4, 4), -1e31)},
            r"train_inputs of at most 1e\+30, got 1e\+31",
        ),
        ({"train_targets": np.zeros(20)}, "train_targets of integers .* got float64"),
        (
            {"train_targets": np.zeros(19, int)},
            r"train_targets .* the shape \(20,\), got .*\(19,\)",
        ),
        ({"test_targets": np.full(7, -1)}, "test_targets that are classes from 0 on, got -1"),
        (
            {"test_inputs": np.zeros((7, 4, 5), np.uint8)},
            r"inputs of one shape, got \(4, 4\) to train",
        ),
    ],
)
def test_other_arrays_are_refused(changes, text, tmp_path):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(DataError, match=rf"own\.npz must hold .*{text}") as error:
        load(str(tmp_path / "own.npz"))
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "own.npz"
    with pytest.raises(DataError, match=r"own\.npz must be a file of arrays, got no such file"):
        load(str(path))
    path.mkdir()
    with pytest.raises(DataError, match="got something else"):
        load(str(path))
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3), train_inputs=np.zeros(3))
    with pytest.raises(DataError, match="must hold the array train_targets, got x, train_inputs"):
        load(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"must be a whole \.npz file"):
        load(str(path))
    np.savez(path, **arrays(train_inputs=np.array([{}] * 20)))
    with pytest.raises(DataError, match=r"must be a whole \.npz file of arrays, got Object arrays"):
        load(str(path))
    whole = write(tmp_path / "whole.npz")
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[200] ^= 1
    (tmp_path / "whole.npz").write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        load(whole)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"0" * 10**6)
    monkeypatch.setattr(_arrays, "available_bytes", lambda: 10**6)
    with pytest.raises(DataError, match=r"must fit into memory, 1e\+06 bytes, got 4000000"):
        load(str(path))


@pytest.mark.parametrize("name", [3, None, b"digits", ["digits"]])
def test_a_name_is_a_text(name):
    with pytest.raises(TypeError, match="`name` must be a text, got"):
        load(name)
