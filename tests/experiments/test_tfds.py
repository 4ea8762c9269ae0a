"""`load` through tensorflow-datasets, without TensorFlow and without a network."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from regjax.experiments._data import DataError, load

UINT8_IMAGE = tfds.features.Tensor(shape=(5, 4, 3), dtype=np.uint8, encoding="bytes")
CLASS = tfds.features.ClassLabel(num_classes=3)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("REGJAX_DATA", raising=False)


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the examples it is given, so that only the files know the data set afterwards."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, features, examples, **options):
        self._features, self._examples = features, examples
        super().__init__(file_format="array_record", **options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._features)
        )

    def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in self._examples.items()}

    def _generate_examples(self):
        raise NotImplementedError


def examples(count, *, shape=(5, 4, 3), dtype=np.uint8, labels=(0, 1, 2)):
    random = np.random.default_rng(count)
    return [
        {"image": random.integers(0, 256, shape, dtype), "label": labels[i % len(labels)]}
        for i in range(count)
    ]


def prepare(folder, *, image=UINT8_IMAGE, label=CLASS, **splits):
    tfds.disable_progress_bar()
    Prepared({"image": image, "label": label}, splits, data_dir=folder).download_and_prepare()
    return folder / "prepared" / "1.0.0"


@pytest.fixture
def small(tmp_path):
    return prepare(tmp_path, train=examples(40), test=examples(7))


def test_a_prepared_set_comes_back_as_it_was_written(small, tmp_path, monkeypatch):
    data = load("prepared", data_dir=tmp_path)
    for images, labels, count in ((*data[1:3], 40), (*data[3:5], 7)):
        written = {e["image"].tobytes(): e["label"] for e in examples(count)}
        found = {i.tobytes(): int(y) for i, y in zip(images, labels, strict=True)}
        assert found == written
    assert [a.dtype for a in data[1:5]] == [np.uint8, np.int32, np.uint8, np.int32]
    assert data.train_inputs.shape == (40, 5, 4, 3)
    assert data.num_classes == 3
    assert data.source == f"tensorflow-datasets prepared/1.0.0 in {tmp_path}"

    monkeypatch.setenv("REGJAX_DATA", str(tmp_path))
    few = load("prepared:1.0.0", num_train=10)
    np.testing.assert_array_equal(few.train_inputs, data.train_inputs[:10])
    with pytest.raises(
        DataError, match="`num_test` must be at most 7, the examples of prepared, got 8"
    ):
        load("prepared", num_test=8)


def test_only_the_examples_asked_for_are_read(small, tmp_path, monkeypatch):
    asked = []
    source = tfds.core.data_sources.array_record.ArrayRecordDataSource
    read = source.__getitem__
    monkeypatch.setattr(source, "__getitem__", lambda s, key: asked.append(key) or read(s, key))
    load("prepared", data_dir=tmp_path, num_train=4, num_test=2)
    assert asked == [0, 1, 2, 3, 0, 1]


def test_grey_images_without_a_channel_get_one(tmp_path):
    image = tfds.features.Tensor(shape=(5, 4), dtype=np.uint8, encoding="bytes")
    prepare(tmp_path, image=image, train=examples(5, shape=(5, 4)), test=examples(2, shape=(5, 4)))
    assert load("prepared", data_dir=tmp_path).test_inputs.shape == (2, 5, 4, 1)


def test_mocked_cifar10():
    with tfds.testing.mock_data(num_examples=5):
        data = load("cifar10")
        source = tfds.data_source("cifar10", split="train", download=False)
        expected = [source[i] for i in range(5)]
    np.testing.assert_array_equal(data.train_inputs, [e["image"] for e in expected])
    np.testing.assert_array_equal(data.train_targets, [e["label"] for e in expected])
    assert data.train_inputs.shape == (5, 32, 32, 3)
    assert data.num_classes == 10


def one_line(message, name, **options):
    with pytest.raises(DataError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes():
    with tfds.testing.mock_data(num_examples=3):
        one_line(r"cats_vs_dogs \(train\) .* one size, got \(\d+, \d+, 3\) and", "cats_vs_dogs")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar_10", r" \(did you mean cifar10 "),
        ("Digits", r" \(did you mean digits\?"),
        ("nonsense_set", ":"),
        ("../escape", ":"),
        ("huggingface:mnist", ""),
        ("cifar10/batch_size=3", ""),
    ],
)
def test_unknown_names(name, hint, tmp_path):
    message = f"Unknown data set '{name}'{hint}.*it must be digits, fashion_mnist, mnist, or the"
    one_line(message, name)
    one_line(message, name, data_dir=tmp_path)


def test_a_known_set_that_is_not_prepared_is_not_downloaded(tmp_path, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda *a, **k: calls.append(a)
    )
    one_line(
        f"kmnist is not prepared as ArrayRecord in {tmp_path}. Prepare it once where there is "
        r"a network and TensorFlow: tfds.builder\('kmnist'",
        "kmnist",
        data_dir=tmp_path,
    )
    assert not calls
    assert not caplog.records


def test_another_file_format(small, tmp_path):
    path = small / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    one_line("prepared is not prepared as ArrayRecord", "prepared", data_dir=tmp_path)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "[Cc]orrupted"),
        (lambda path: path.write_bytes(path.read_bytes()[:70000]), ""),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.parent / "features.json").write_text("{"), ""),
    ],
)
def test_damaged_files(small, tmp_path, damage, message):
    damage(small / "prepared-train.array_record-00000-of-00001")
    message = rf"prepared.* in {tmp_path} cannot be read \(.*{message}.*\): prepare it again"
    one_line(message, "prepared", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "more"])
def test_only_files_with_an_end_are_read(small, tmp_path, name):
    (small / name).unlink(missing_ok=True)
    os.mkfifo(small / name)
    one_line(f"{name} must be a file of data, a regular file, got a named pipe", "prepared",
             data_dir=tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": tfds.features.Scalar(np.int64)}, "uint8 images and a class label"),
        (
            {
                "image": tfds.features.Tensor(shape=(5, 4, 3), dtype=np.uint16, encoding="bytes"),
                "train": examples(4, dtype=np.uint16),
                "test": examples(3, dtype=np.uint16),
            },
            "uint8 images and a class label",
        ),
        ({"test": examples(3, labels=(0, -1))}, r"\(test\) .* from 0 to 2, got -1 to 0"),
        ({"test": None}, "cannot be read .*test"),
    ],
)
def test_sets_that_are_not_for_image_classification(tmp_path, options, message):
    options = {"train": examples(4), "test": examples(3)} | options
    prepare(tmp_path, **{name: value for name, value in options.items() if value is not None})
    one_line(message, "prepared", data_dir=tmp_path)


def test_other_features(tmp_path):
    features = {"image": UINT8_IMAGE, "boxes": tfds.features.Scalar(np.int64)}
    rows = [{"image": e["image"], "boxes": 1} for e in examples(3)]
    tfds.disable_progress_bar()
    Prepared(features, {"train": rows, "test": rows}, data_dir=tmp_path).download_and_prepare()
    one_line(
        "must have the features image and label, got boxes, image", "prepared", data_dir=tmp_path
    )


def test_without_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert load("digits").num_classes == 10
    one_line(r"a Python package that is missing .*pip install 'regjax\[run\]'", "cifar10")
