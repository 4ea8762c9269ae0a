import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import _digest, _files, curvature
from regjax.curvature._operators._traced import TracedOperator
from tests.curvature import long_runs

DIAGONAL = np.float32(np.linspace(0.1, 1, 60) ** 6 * 10)


def operator(diagonal=DIAGONAL):
    return curvature.from_matvec(Partial(jnp.multiply, jnp.asarray(diagonal)), diagonal)


MATRIX = operator()


def top(seed=0, matrix=MATRIX, k=3, **options):
    options = {"max_basis": 8, "tol": 1e-5, "key": jax.random.key(seed), **options}
    return curvature.top_eigenpairs(matrix, k, **options)


def tridiagonal(**options):
    return curvature.lanczos(MATRIX, DIAGONAL, 25, key=jax.random.key(1), **options)


def density(**options):
    options = {"num_steps": 8, "num_probes": 3, "deflate": 13, "key": jax.random.key(2), **options}
    return curvature.spectral_density(MATRIX, **options)


def plain_density(**options):
    return density(deflate=0, **options)


SOLVERS = {f.__name__: f for f in (top, tridiagonal, density, plain_density)}


def bits(result):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result)]


class Stopped(Exception):
    pass


def stop(solve, after, **options):
    """Runs `solve` for some products; returns the number of the first one."""
    counts = []

    def callback(count, total, progress):
        counts.append(count)
        if count >= after:
            raise Stopped

    with pytest.raises(Stopped):
        solve(callback=callback, **options)
    return counts[0]


def files(folder):
    return sorted(pathlib.Path(folder).iterdir())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_in_pieces_gives_the_bits_of_an_undisturbed_one(name, tmp_path):
    solve, counts = SOLVERS[name], []
    expected = solve(callback=lambda count, total, _: counts.append((count, total)))
    checkpoint, last = curvature.Checkpoint(tmp_path / "new" / "folder", every=3), counts[-1][0]
    for after in range(5, last, 5):
        first = stop(solve, after, checkpoint=checkpoint)
        assert first == (1 if after == 5 else (after - 5) // 3 * 3 + 1)
    again = []
    result = solve(
        checkpoint=checkpoint, callback=lambda count, total, _: again.append((count, total))
    )
    assert bits(result) == bits(expected)
    assert again == counts[-len(again) :]
    assert len(again) < last
    # What is finished costs a product, that of the check.
    assert bits(solve(checkpoint=checkpoint)) == bits(expected)


@pytest.mark.slow
def test_twenty_runs_killed_at_any_time_give_the_same_answers(tmp_path):
    # Seven at once: three kills interrupt them at twenty-one moments.
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", long_runs.__name__, str(tmp_path / "runs")]
    draw, killed, root = random.Random(0), 0, pathlib.Path(__file__).parents[2]
    for life in range(4):
        with subprocess.Popen(
            command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "started\n"
            if life < 3:
                time.sleep(draw.uniform(0, 0.15))
                process.kill()
            lines = process.stdout.read().splitlines()
            killed += (life < 3) * (len(long_runs.RUNS) - len(lines))
            assert process.wait(60) == (-signal.SIGKILL if life < 3 else 0)
    assert killed >= 20
    assert len(lines) == len(long_runs.RUNS)
    for line in lines:
        _, first, answer, undisturbed = line.split()
        assert answer == undisturbed
        assert first != "1"  # it went on, and did not begin anew


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def clear(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, clear])
def test_a_damaged_newest_file_costs_the_way_from_the_one_before(damage, tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=4)
    stop(tridiagonal, 14, checkpoint=checkpoint)
    newest = files(tmp_path)[-1]
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} must be .* Going back to the state bef"):
        assert stop(tridiagonal, 19, checkpoint=checkpoint) == 9
    assert newest not in files(tmp_path)
    assert bits(tridiagonal(checkpoint=checkpoint)) == bits(tridiagonal())


def test_a_damaged_or_missing_older_file_costs_more_and_all_of_them_everything(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=4)
    stop(tridiagonal, 14, checkpoint=checkpoint)
    files(tmp_path)[1].unlink()
    with pytest.warns(UserWarning, match="no such file"):
        assert stop(tridiagonal, 9, checkpoint=checkpoint) == 5
    for path in files(tmp_path):
        flip(path)
    with pytest.warns(UserWarning, match="damaged"):
        assert stop(tridiagonal, 4, checkpoint=checkpoint) == 1
    assert bits(tridiagonal(checkpoint=checkpoint)) == bits(tridiagonal())


def test_the_state_before_the_newest_outlives_a_restart_of_the_basis(tmp_path):
    # The basis of eight rows is compressed again and again; what is written after that does not
    # refer to what was written before, and still the state before must be whole.
    checkpoint, expected = curvature.Checkpoint(tmp_path, every=1), bits(top())
    for after in range(8, 20):
        stop(top, after, checkpoint=checkpoint)
        truncate(files(tmp_path)[-1])
        with pytest.warns(UserWarning, match="damaged"):
            assert stop(top, after, checkpoint=checkpoint) == after
    assert bits(top(checkpoint=checkpoint)) == expected


def record_rows(monkeypatch):
    written, save = [], _files.save

    def recording(path, tree, *, metadata):
        written.append({name: len(rows) for name, rows in tree["rows"].items()})
        vectors = [leaf for leaf in tree["rest"].values() if leaf.shape[-1:] == DIAGONAL.shape]
        assert max(leaf.size for leaf in vectors) == DIAGONAL.size  # no rows among the rest
        save(path, tree, metadata=metadata)

    monkeypatch.setattr(_files, "save", recording)
    return written


def test_only_rows_that_are_new_are_written(tmp_path, monkeypatch):
    written = record_rows(monkeypatch)
    tridiagonal(checkpoint=curvature.Checkpoint(tmp_path / "a", every=5))
    assert written == [{".basis.blocks": 5}] * 5
    written.clear()
    density(checkpoint=curvature.Checkpoint(tmp_path / "b", every=4))
    # Thirteen products find what is taken out, which is written once; eight belong to each probe.
    count = int(density().num_eigenvalues)
    assert count >= 1
    basis, taken, probe = ".basis.blocks", ".deflation.rows.blocks", ".probes.basis.blocks"
    assert written[:4] == [{basis: 4}, {basis: 4}, {basis: 4}, {taken: count, probe: 3}]
    assert written[4:] == [{probe: 4}, {probe: 3}, {probe: 4}, {probe: 3}, {probe: 4}]


def test_rows_are_written_anew_after_a_restart_and_old_files_are_deleted(tmp_path, monkeypatch):
    written = record_rows(monkeypatch)
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    stop(top, 12, checkpoint=checkpoint)
    # At eight rows the basis is compressed to five.
    assert [rows[".krylov.basis.blocks"] for rows in written] == [2, 2, 2, 5, 2, 6]
    assert [path.name[:8] for path in files(tmp_path)] == ["00000008", "00000010", "00000012"]
    (tmp_path / ".00000012.products.npz.abc.tmp").touch()
    (tmp_path / "other.txt").touch()
    top(checkpoint=checkpoint)
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "other.txt").exists()


def quadratic(params, inputs):
    return jnp.mean((inputs @ params) ** 2)


def fourth(params, inputs):
    return quadratic(params, inputs) * 2


PARAMS, INPUTS = np.float32(np.arange(1, 9)), np.random.default_rng(0).normal(size=(12, 8))


def of_loss(loss_fn=quadratic, scale=1.0, shift=0.0, chunk_size=None):
    inputs = jnp.asarray(INPUTS + shift, jnp.float32)
    return curvature.hessian(loss_fn, jnp.asarray(PARAMS * scale), inputs, chunk_size=chunk_size)


def test_a_checkpoint_of_another_problem_is_refused(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda **options: top(checkpoint=checkpoint, matrix=of_loss(), **options)
    stop(solve, 4, max_basis=7)
    for wrong, text in [
        ({"k": 2}, r"`k` must be 2, got 3 in .*00000004.*npz"),
        ({"tol": 1e-4}, "`tol` must be 0.0001, got 1e-05"),
        ({"which": "SA"}, "`which` must be 'SA', got 'LA'"),
        ({"max_basis": 8}, "`max_basis` must be 8, got 7"),
        ({"seed": 1}, "`key` must be"),
        ({"matrix": of_loss(scale=2.0)}, "`params` must be"),
        ({"matrix": of_loss(shift=0.5)}, "`batch` must be"),
        ({"matrix": of_loss(fourth)}, "`program` must be .*: another loss or model"),
        ({"matrix": operator()}, "`number of parameters` must be 60, got 8"),
    ]:
        options = {"max_basis": 7, "matrix": of_loss(), **wrong}
        with pytest.raises(ValueError, match=r"`checkpoint` must be of the same problem: " + text):
            top(checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match="`solver` must be 'lanczos', got 'top_eigenpairs'"):
        curvature.lanczos(of_loss(), PARAMS, 5, checkpoint=checkpoint)
    # Chunks are another order of summation and no other problem.
    chunked = top(matrix=of_loss(chunk_size=5), max_basis=7, checkpoint=checkpoint)
    np.testing.assert_allclose(
        chunked.values, np.linalg.eigvalsh(2 * INPUTS.T @ INPUTS / 12)[:-4:-1], rtol=1e-5
    )


def test_a_matrix_given_by_its_product_is_known_by_its_arrays(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    stop(top, 4, checkpoint=checkpoint)
    other = DIAGONAL.copy()
    other[[3, 4]] = other[[4, 3]]
    with pytest.raises(ValueError, match="`linear_map` must be"):
        top(checkpoint=checkpoint, matrix=operator(other))


def test_a_digest_sees_place_type_and_every_bit():
    array = np.arange(1.0, 7.0, dtype=np.float32)
    trees = [
        array, array[::-1].copy(), array.reshape(2, 3), array.view(np.int32), -array, array[:5],
        np.where(array == 3, np.nextafter(array, 9), array), {"a": array}, (array, array),
        jnp.asarray(array, jnp.bfloat16), jnp.asarray(array, jnp.float16), array > 3, array > 4,
        array + 1j, jax.random.key(0), jax.random.key(1), np.zeros(6), np.int8(array),
    ]  # fmt: skip
    digests = [_digest.digest(tree) for tree in trees]
    assert len(set(digests)) == len(digests)
    assert digests == [_digest.digest(tree) for tree in trees]


def test_inside_of_jit_a_checkpoint_is_refused(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path)
    for solve in (
        lambda seed: top(key=jax.random.key(seed), checkpoint=checkpoint),
        lambda seed: density(key=jax.random.key(seed), checkpoint=checkpoint),
        lambda seed: plain_density(key=jax.random.key(seed), checkpoint=checkpoint),
        lambda start: curvature.lanczos(operator(), start + DIAGONAL, 5, checkpoint=checkpoint),
    ):
        with pytest.raises(ValueError, match=r"`checkpoint` must be None inside of jax\.jit"):
            jax.make_jaxpr(solve)(0)


def test_what_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(
        _files.CheckpointError, match="file must be a folder, got something else there"
    ):
        top(checkpoint=curvature.Checkpoint(tmp_path / "file"))
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        top(checkpoint=curvature.Checkpoint(tmp_path, every=0))
    fail = lambda *arguments: (_ for _ in ()).throw(OSError(28, "full"))
    monkeypatch.setattr(_files._archive, "write", fail)
    with pytest.raises(_files.CheckpointError, match="must be writable, got full"):
        top(checkpoint=curvature.Checkpoint(tmp_path, every=2))


@pytest.mark.parametrize(
    ("solve", "text"),
    [
        (top, "`top_eigenpairs` .* Lower `max_basis`, or the `chunk_size` of the operator"),
        (tridiagonal, "`lanczos` .* Lower `num_steps`, or"),
        (density, "Lower `num_steps` or `deflate` or `num_probes`, or the `chunk_size`"),
        (
            lambda: curvature.trace(MATRIX, key=jax.random.key(0), num_matvecs=3),
            "`trace` .* Lower `num_matvecs`, or",
        ),
    ],
)
def test_out_of_memory_names_what_to_lower_and_the_bytes(solve, text, monkeypatch):
    def exhausted(operator, vector):
        if not isinstance(vector, jax.core.Tracer):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory of 9 bytes.")
        return vector  # while the memory is estimated

    monkeypatch.setattr(TracedOperator, "product", exhausted)
    with pytest.raises(MemoryError, match=text + r".* needs about [0-9.]+ (B|KiB) on each device"):
        solve()


def test_other_errors_of_the_device_pass(monkeypatch):
    def fails(operator, vector):
        raise jax.errors.JaxRuntimeError("INTERNAL: no.")

    monkeypatch.setattr(TracedOperator, "product", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tridiagonal()


class Trainer:
    decay, target = 0.0, np.float32(np.arange(8))

    def loss(self, params, inputs):
        return jnp.mean((inputs @ (params - self.target)) ** 3) + self.decay * jnp.sum(params**2)


def weighted(curvatures):
    return lambda params: jnp.sum(curvatures * params**2) / 2


def of_curvatures(change=None, dtype=jnp.float32):
    values = np.linspace(1.0, 1.5, 1000)
    if change is not None:
        values[change[0]] = change[1]
    return curvature.hessian(weighted(jnp.asarray(values, dtype)), jnp.zeros(1000, dtype))


@jax.custom_jvp
def ramp(x):
    return x * x


ramp.defjvp(lambda primals, tangents: (ramp(*primals), 2 * primals[0] * tangents[0]))


@jax.custom_jvp
def other_ramp(x):
    return x * x


other_ramp.defjvp(lambda primals, tangents: (other_ramp(*primals), 3 * primals[0] * tangents[0]))


def bound_loss(decay):
    trainer = Trainer()
    trainer.decay = decay
    return trainer.loss


CHANGES = {
    # One value of a thousand that a closure reads, by a little; a number; a rule of derivation.
    "closure": (of_curvatures, lambda: of_curvatures((500, 1.6)), "function"),
    "least bit": (
        of_curvatures,
        lambda: of_curvatures((999, np.nextafter(np.float32(1.5), np.float32(2)))),
        "function",
    ),
    "bfloat16": (
        lambda: of_curvatures(None, jnp.bfloat16),
        lambda: of_curvatures((3, 1.04), jnp.bfloat16),
        "function",
    ),
    "number": (lambda: of_loss(bound_loss(0.0)), lambda: of_loss(bound_loss(1e-4)), "program"),
    "rule": (
        lambda: of_loss(lambda p, x: jnp.sum(ramp(p) * x[0])),
        lambda: of_loss(lambda p, x: jnp.sum(other_ramp(p) * x[0])),
        "program",
    ),
    "factor": (
        lambda: 2 * of_loss(), lambda: 2.001 * of_loss(), "factor",
    ),
    "product": (
        lambda: curvature.from_matvec(lambda v: 2.0 * v, PARAMS),
        lambda: curvature.from_matvec(lambda v: 2.0001 * v, PARAMS),
        "program",
    ),
    "outputs": (
        lambda: of_outputs(lambda o, y: jnp.mean((o - y) ** 2)),
        lambda: of_outputs(lambda o, y: jnp.mean((o - y) ** 2 + 1e-5 * o**2)),
        "program",
    ),
    "stream": (lambda: of_source(INPUTS), lambda: of_source(INPUTS[::-1] * 1.0001), "source"),
}  # fmt: skip


def of_outputs(output_loss_fn):
    inputs = jnp.asarray(INPUTS, jnp.float32)
    model_fn = lambda params, x: jnp.tanh(x @ params)
    return curvature.gauss_newton(model_fn, output_loss_fn, PARAMS, inputs, inputs[:, 0])


def of_source(inputs, sizes=(5, 7)):
    pieces = np.split(np.asarray(inputs, np.float32), np.cumsum(sizes)[:-1])
    return curvature.stream(curvature.hessian, quadratic, PARAMS, [(piece,) for piece in pieces])


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_loss_reads_and_computes_is_part_of_the_problem(name, tmp_path):
    one, other, named = CHANGES[name]
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda **options: top(max_basis=7, tol=1e-7, checkpoint=checkpoint, **options)
    stop(lambda **options: solve(matrix=one(), **options), 3)
    with pytest.raises(ValueError, match=rf"must be of the same problem: `.*{named}` must be"):
        solve(matrix=other())
    # The same again, from new function objects, goes on.
    assert stop(lambda **options: solve(matrix=one(), **options), 3) == 3


def test_of_a_source_neither_the_order_nor_the_batches_count(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda matrix: (
        lambda **options: top(
            matrix=matrix, max_basis=7, tol=1e-7, checkpoint=checkpoint, **options
        )
    )
    stop(solve(of_source(INPUTS)), 3)
    assert stop(solve(of_source(INPUTS[::-1], (2, 7, 3))), 3) == 3


def test_a_file_that_is_not_understood_is_an_error_and_stays(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda **options: top(checkpoint=checkpoint, **options)
    stop(solve, 6)
    newest, saved = files(tmp_path)[-1], {path: path.read_bytes() for path in files(tmp_path)}
    newest.unlink()
    newest.mkdir()
    with pytest.raises(
        _files.KindError, match="must be a checkpoint, a regular file, got a folder"
    ):
        solve()
    newest.rmdir()
    newer = saved[newest].replace(b'"version": 1', b'"version": 9')
    _rewrite(newest, newer)
    with pytest.raises(_files.VersionError, match="must have schema version 1"):
        solve()
    newest.write_bytes(saved[newest])
    assert {path: path.read_bytes() for path in files(tmp_path)} == saved
    assert stop(solve, 7) == 7


def _rewrite(path, content):
    """Writes a changed archive with checksums that are right again."""
    content = bytearray(content)
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        for member in archive.infolist():
            start = member.header_offset
            length = int.from_bytes(content[start + 26 : start + 28], "little")
            extra = int.from_bytes(content[start + 28 : start + 30], "little")
            data = content[start + 30 + length + extra :][: member.file_size]
            crc = zlib.crc32(data).to_bytes(4, "little")
            old = member.CRC.to_bytes(4, "little")
            content = bytearray(bytes(content).replace(old, crc))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("facts", None), ("facts", 3), ("product", None), ("product", [1.0]),
        ("product", ["a", "b"]), ("count", None), ("count", -1), ("count", 1.5), ("count", True),
        ("stage", None), ("stage", 1), ("stage", 10**9), ("parts", None), ("parts", []),
        ("parts", {}), ("parts", {".krylov.basis.blocks": 3}), ("more", 1),
        ("parts", {".krylov.basis.blocks": [0, [["../../x.npz", 0, 3]]]}),
        ("parts", {".krylov.basis.blocks": [0, [["00000006.00000000.products.npz", 0, 10**12]]]}),
        ("parts", {".krylov.basis.blocks": [0, [["00000006.00000000.products.npz", 2, 3]]]}),
        ("parts", {".elsewhere": [0, []]}),
    ],
)  # fmt: skip
def test_what_a_file_says_of_itself_is_checked(name, value, tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda **options: top(checkpoint=checkpoint, **options)
    stop(solve, 6)
    newest = files(tmp_path)[-1]
    metadata = _files.read_metadata(newest) | {name: value}
    if value is None:
        del metadata[name]
    _files.save(newest, {}, metadata=metadata)
    before = files(tmp_path)
    with pytest.raises(_files.CheckpointError, match=rf"{newest.name} must be .*`{name}` must be"):
        solve()
    assert files(tmp_path) == before


def test_files_of_another_problem_that_are_older_are_left_alone(tmp_path):
    other = tmp_path / "00000001.0123abcd.products.npz"
    _files.save(other, {}, metadata={"facts": {"solver": "another"}})
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    with pytest.raises(ValueError, match="`solver` must be 'top_eigenpairs', got 'another'"):
        top(checkpoint=checkpoint)
    moved = other.rename(tmp_path / "elsewhere")
    stop(lambda **options: top(checkpoint=checkpoint, **options), 6)
    moved.rename(other)
    top(checkpoint=checkpoint)
    assert other in files(tmp_path)


def test_one_folder_is_of_one_run_at_a_time(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path, every=2)

    def second(count, total, progress):
        with pytest.raises(_files.LockedError, match="must be used by one run at a time"):
            tridiagonal(checkpoint=checkpoint)
        raise Stopped

    with pytest.raises(Stopped):
        top(checkpoint=checkpoint, callback=second)
    # What a killed process leaves behind locks nobody out.
    (tmp_path / ".products.lock").write_text('{"process": 1, "host": "elsewhere"}')
    assert bits(top(checkpoint=checkpoint)) == bits(top())
