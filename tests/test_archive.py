"""Files that somebody else made up: nothing is read that is not bounded, one clear error."""

import io
import json
import os
import resource
import struct
import zipfile

import numpy as np
import pytest

from regjax import CheckpointError, _archive, _files
from regjax._files import DamagedError, KindError, RefusedError, VersionError, load, read_metadata

HEADER = {
    "schema": "regjax.checkpoint",
    "version": 1,
    "leaves": [{"name": "tree", "dtype": "float32", "shape": [2]}],
    "metadata": {},
}
LIKE = np.zeros(2, np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.npz"


@pytest.fixture(autouse=True)
def _little_memory():
    """What fills the memory ends in a MemoryError, which is none of the expected errors."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header_of(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return npy(np.frombuffer(text, np.uint8))


def make(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def message(path, error=CheckpointError):
    with pytest.raises(error) as caught:
        load(path, LIKE)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_what_is_made_up_well_is_read(path):
    make(path, {"tree.npy": npy(LIKE), "header.npy": header_of(HEADER)})
    np.testing.assert_array_equal(load(path, LIKE), LIKE)


def announced(shape, dtype="<f4", data=b"12345678"):
    """An .npy that says another shape than it has."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        announced((10**15,)),
        announced((2**62, 4)),  # a size that is 0 modulo 2^64
        announced((-2,)),
        announced((2,), "O"),
        announced((2,), "<f4,<f4"),
        announced((2, 0)),
        announced("[[2]]"),
        announced((2,), data=b"1234"),
        announced((2,), data=b"1234567890"),
        b"",
        b"PK\3\4",
        npy(np.zeros((200, 200), np.float32)),
    ],
)
def test_arrays_that_are_not_what_they_say(content, path):
    make(path, {"tree.npy": content, "header.npy": header_of(HEADER)})
    assert "damaged file" in message(path, DamagedError) or "its table says" in message(path)


def test_bombs_are_not_unpacked(path, tmp_path):
    bomb = npy(np.zeros(10**8, np.float32))
    members = {"tree.npy": bomb, "header.npy": header_of(HEADER)}
    make(path, members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    assert "another kind of file" in message(path)
    # Only the array is one.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", header_of(HEADER))
        archive.writestr("tree.npy", bomb, zipfile.ZIP_DEFLATED)
    assert "tree is compressed" in message(path, DamagedError)
    # An archive within one, and one under the name of an array.
    make(tmp_path / "outer.npz", {"header.npy": path.read_bytes(), "tree.npy": path.read_bytes()})
    assert "damaged file" in message(tmp_path / "outer.npz", DamagedError)


def test_members_that_are_not_asked_for_are_not_read(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", header_of(HEADER))
        archive.writestr("tree.npy", npy(LIKE))
        archive.writestr("../../other.npy", b"\0" * 10**9, zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(load(path, LIKE), LIKE)


def test_a_list_of_members_without_end_is_not_read(path):
    """The last bytes of the file say how long the list is; the file is almost all hole."""
    size = 2**33
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(size)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 0, 0)
        file.write(end)
    assert "a list of members of" in message(path, DamagedError)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"version": 2}, VersionError, "version 1, the one that this regjax reads, got 2"),
        ({"version": None}, VersionError, "got None"),
        ({"version": "1"}, VersionError, "got 1"),
        ({"version": "\n" * 1000}, VersionError, r"got '\\n"),
        ({"schema": "another"}, CheckpointError, "another kind of file"),
        ({"leaves": None}, CheckpointError, "a table of its leaves"),
        ({"leaves": [1]}, CheckpointError, "a table of its leaves"),
        ({"leaves": [{"name": "tree"}]}, CheckpointError, "a table of its leaves"),
        ({"leaves": []}, CheckpointError, "the leaf tree must be there"),
        ({"metadata": [1]}, CheckpointError, "metadata by name"),
    ],
)
def test_headers_with_wrong_or_missing_entries(changes, error, text, path):
    make(path, {"tree.npy": npy(LIKE), "header.npy": header_of({**HEADER, **changes})})
    assert text.replace("\\\\", "\\") in message(path, error)
    for name in changes:
        without = {key: value for key, value in HEADER.items() if key != name}
        make(path, {"tree.npy": npy(LIKE), "header.npy": header_of(without)})
        message(path)


@pytest.mark.parametrize("text", [b"[" * 10**6, b"9" * 10**5, b"\xff", b"{", b"null"])
def test_headers_that_are_no_json(text, path):
    make(path, {"tree.npy": npy(LIKE), "header.npy": header_of(text)})
    assert "another kind of file" in message(path)


def test_a_key_of_another_kind_is_refused(path):
    import jax

    key = jax.random.key(0)
    _files.save(path, key, metadata={})
    with zipfile.ZipFile(path) as archive:
        array, header = archive.read("tree.npy"), json.loads(np.load(path)["header"].tobytes())
    for implementation in ("rbg", "none", ["a"], 7):
        header["leaves"][0]["key_impl"] = implementation
        make(path, {"tree.npy": array, "header.npy": header_of(header)})
        with pytest.raises(CheckpointError, match="must hold a key of the kind key<fry>"):
            load(path, key)


def test_endless_files_are_not_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, what in (("/dev/zero", "a device"), ("/dev/stdin", None), (pipe, "a named pipe")):
        with pytest.raises(CheckpointError, match=what or "must be a checkpoint"):
            read_metadata(path)
    with pytest.raises(KindError):
        load(pipe, LIKE)
    # Regular files for `stat`, which the system makes up: reading them may wait for ever.
    for path in ("/proc/kmsg", "/proc/self/mem", "/proc/uptime"):
        if os.path.exists(path):
            with pytest.raises(CheckpointError, match=r"it is empty|that can be read"):
                read_metadata(path)


def test_a_device_that_fails_is_no_damage(path, monkeypatch):
    """What the system does not give may be given tomorrow: nobody may delete it for that."""
    _files.save(path, LIKE, metadata={})

    def fail(self, size=-1):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_archive._Bounded, "read", fail)
    assert "must be readable, got Input/output error" in message(path, RefusedError)
