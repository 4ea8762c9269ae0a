"""Locks, regular files and folders to write to, with real processes and real pipes."""

import os
import pathlib
import signal
import socket
import threading
import time

import pytest

from regjax import _disk
from regjax._disk import KindError, LockedError, MissingError, RefusedError, locked, regular_file
from tests import processes

# Without the package, which takes seconds to import.
HOLD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("disk", {_disk.__file__!r})
disk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk)
with disk.locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder."""
    with processes.start(HOLD, tmp_path) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_the_folder_of_a_living_process_is_refused_and_names_it(holder, tmp_path):
    with pytest.raises(LockedError) as caught, locked(tmp_path):
        pass
    assert f"{tmp_path} must be used by one run at a time" in str(caught.value)
    assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)
    holder.communicate("\n", timeout=60)
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_process_locks_nobody_out(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(60)
    assert os.listdir(tmp_path) == [".lock"]
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


def test_a_stopped_process_keeps_its_lock(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(LockedError), locked(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGCONT)


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    refused = pytest.raises(LockedError, match="another run of this process")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path), locked(tmp_path, name=".other"), locked(tmp_path / "below"):
        pass


def test_an_error_inside_opens_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError


def test_of_many_that_come_at_once_never_two_are_inside(tmp_path):
    """The file is taken away at the end of each turn, under the eyes of those who opened it."""
    inside, most, turns = [], [], []

    def enter():
        own = 0
        while own < 50:
            try:
                with locked(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    turns.append(1)
                    time.sleep(1e-4)  # long enough for another one, were it let in
                    inside.pop()
                own += 1
            except LockedError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(turns) == 200
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_made_is_refused_or_warned_of(tmp_path, monkeypatch):
    (tmp_path / "target").touch()
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(RefusedError, match=r"\.lock must be a file to lock"), locked(tmp_path):
        pass
    (tmp_path / ".lock").unlink()

    def no_locks(descriptor, operation):
        raise OSError(_disk.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_disk.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="files cannot be locked"), locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"process": "x", "host": 1}', "[" * 4000])
def test_what_a_holder_wrote_may_be_anything(text, tmp_path):
    path = tmp_path / "owner"
    path.write_text(text)
    with path.open() as file:
        assert _disk._holder(file.fileno()) == "another process"


def test_regular_files_have_their_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(path)
    assert regular_file(path, kind="a text") == 3
    assert regular_file(str(tmp_path / "link"), kind="a text", max_bytes=3) == 3
    with pytest.raises(KindError, match="must be a text of at most 2 bytes, got 3"):
        regular_file(path, kind="a text", max_bytes=2)


def bind(path):
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(path))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda path: None, MissingError, "must be a text, got no such file"),
        (pathlib.Path.mkdir, KindError, "a regular file, got a folder"),
        (os.mkfifo, KindError, "a regular file, got a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), KindError, "a regular file, got a device"),
        (lambda path: path.symlink_to(path), RefusedError, "symbolic links"),
        (bind, KindError, "a regular file, got a socket"),
    ],
)
def test_what_is_no_regular_file_says_what_it_is(make, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("it")
    make(path)
    with pytest.raises(error, match=text) as caught:
        regular_file(path, kind="a text")
    assert "it must be a text" in str(caught.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch(mode=0)

    def refuse(*arguments):  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_disk.os, "open", refuse)
    with pytest.raises(RefusedError, match="a text that can be read, got Permission denied"):
        regular_file(path, kind="a text")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_of_no_file_are_one_line(name):
    with pytest.raises(_disk.CheckpointError) as caught:
        regular_file(name, kind="a text")
    assert "\n" not in str(caught.value)


def test_folders_are_tried_before_they_are_used(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    assert _disk.writable_folder(folder) == folder
    assert os.listdir(folder) == []
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for bad in ("file", "file/below", "pipe", "pipe/below"):
        with pytest.raises(KindError, match=f"{bad} must be a folder, got something else"):
            _disk.writable_folder(tmp_path / bad)

    def refuse(*arguments, **options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    with pytest.raises(RefusedError, match="must be a folder to write to, got Read-only"):
        _disk.writable_folder(folder)


def test_only_a_file_is_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = pytest.raises(KindError, match="be a file or not be there, got a named pipe")
    with refused, _disk.replacing(pipe) as file:
        file.write(b"abc")
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
