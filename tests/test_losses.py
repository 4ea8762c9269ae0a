"""Weighted means over parts of the data: against dense float64 matrices of the whole loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import regjax
from regjax import WeightedMean, curvature, diagnostics, pruning
from tests import oracles

N, T, D, C = 13, 4, 3, 5
KEYS = jax.random.split(jax.random.key(0), 5)
INPUTS = jax.random.normal(KEYS[0], (N, T, D))
TARGETS = jax.random.randint(KEYS[1], (N, T), 0, C)
# Ragged, and with examples of no weight at the end.
MASK = (
    (jax.random.uniform(KEYS[2], (N, T)) < 0.4).astype(jnp.float32).at[9:].set(0.0).at[0].set(1.0)
)
PARAMS = {
    "a": jax.random.normal(KEYS[3], (D, 6)),
    "b": 0.5 * jax.random.normal(KEYS[4], (6, C)),
}
CHUNKS = [None, 1, 4, 5, 12, 13]


def model(params, inputs):
    return jnp.tanh(inputs @ params["a"]) @ params["b"]


def nll(outputs, targets):
    logs = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]


def masked(outputs, batch):
    targets, mask = batch
    return WeightedMean(jnp.sum(mask * nll(outputs, targets)), jnp.sum(mask))


def loss_fn(params, inputs, targets, mask):
    return masked(model(params, inputs), (targets, mask))


def with_penalty(params, inputs, targets, mask):
    """A mean over tokens, and one over sequences."""
    outputs = model(params, inputs)
    squares = jnp.sum(jax.nn.logsumexp(outputs, -1) ** 2)
    return masked(outputs, (targets, mask)), WeightedMean(squares, jnp.int32(targets.size))


def plain(params, inputs, targets, mask):
    loss = jnp.sum(mask * nll(model(params, inputs), targets)) / jnp.sum(mask)
    return loss


def plain_with_penalty(params, inputs, targets, mask):
    return plain(params, inputs, targets, mask) + jnp.mean(
        jax.nn.logsumexp(model(params, inputs), -1) ** 2
    )


BATCH = (INPUTS, TARGETS, MASK)


def parts(*sizes):
    ends = np.cumsum(sizes)
    return [
        tuple(leaf[end - size : end] for leaf in BATCH)
        for end, size in zip(ends, sizes, strict=True)
    ]


def dense(loss):
    """By plain autodiff, of the whole batch."""
    with jax.enable_x64(True):
        params, batch = oracles.in_double((PARAMS, BATCH))
        flat, unravel = ravel_pytree(params)
        return np.asarray(jax.hessian(lambda vector: loss(unravel(vector), *batch))(flat))


def close(operator, expected):
    np.testing.assert_allclose(operator.dense(), expected, atol=2e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_the_hessian_is_that_of_the_whole_loss(chunk_size):
    operator = curvature.hessian(loss_fn, PARAMS, *BATCH, chunk_size=chunk_size)
    close(operator, dense(plain))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_weighted_means_add_up(chunk_size):
    operator = curvature.hessian(with_penalty, PARAMS, *BATCH, chunk_size=chunk_size)
    close(operator, dense(plain_with_penalty))


@pytest.mark.parametrize("sizes", [(13,), (5, 3, 5), (4, 4, 4, 1)])
@pytest.mark.parametrize(("loss", "whole"), [(loss_fn, plain), (with_penalty, plain_with_penalty)])
def test_a_stream_reads_the_weights_first(sizes, loss, whole):
    for source in (parts(*sizes), parts(*sizes)[::-1]):  # reversed it begins without any weight
        close(curvature.stream(curvature.hessian, loss, PARAMS, source), dense(whole))


def test_the_quotients_of_parts_are_another_matrix():
    """What a mean of means would be, and what this file would say of it."""
    means = [dense_of(part) * len(part[0]) / N for part in parts(4, 5)]
    assert np.abs(sum(means) - dense(plain)).max() > 1e-2


def dense_of(part):
    flat, unravel = ravel_pytree(PARAMS)
    return np.asarray(jax.hessian(lambda vector: plain(unravel(vector), *part))(flat))


def gauss_newton_matrix():
    flat, unravel = ravel_pytree(PARAMS)
    jacobian = jax.jacobian(lambda vector: model(unravel(vector), INPUTS))(flat)
    share = jax.nn.softmax(model(PARAMS, INPUTS))
    blocks = jnp.einsum("ntc,cd->ntcd", share, jnp.eye(C)) - share[..., None] * share[..., None, :]
    total = jnp.einsum("ntcp,ntcd,ntdq,nt->pq", jacobian, blocks, jacobian, MASK)
    return np.asarray(total / jnp.sum(MASK))


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13])
def test_gauss_newton_and_fisher_are_one_matrix(chunk_size):
    expected = gauss_newton_matrix()
    data = (PARAMS, INPUTS, (TARGETS, MASK))
    close(curvature.gauss_newton(model, masked, *data, chunk_size=chunk_size), expected)
    build = functools.partial(curvature.gauss_newton, model, nll, PARAMS, INPUTS, TARGETS)
    close(build(MASK, chunk_size=chunk_size), expected)
    fisher = functools.partial(curvature.fisher, model, PARAMS, INPUTS)
    for mask in (MASK, MASK > 0):
        operator = fisher(mask, key=None, num_samples=None, chunk_size=chunk_size)
        close(operator, expected)
    # A mean over sequences of sums over tokens, if nothing is said.
    ones = jnp.ones(N)
    operator = fisher(key=None, num_samples=None, chunk_size=chunk_size)
    close(operator, fisher(ones, key=None, num_samples=None).dense())
    tokens = fisher(jnp.ones((N, T)), key=None, num_samples=None, chunk_size=chunk_size)
    close(T * tokens, operator.dense())


def test_draws_of_the_fisher_do_not_depend_on_the_parts():
    options = {"key": jax.random.key(3), "num_samples": 2}
    whole = curvature.fisher(model, PARAMS, INPUTS, MASK, **options).dense()
    chunked = curvature.fisher(model, PARAMS, INPUTS, MASK, chunk_size=4, **options)
    source = [(inputs, mask) for inputs, _, mask in parts(5, 3, 5)]
    close(chunked, whole)
    close(curvature.stream(curvature.fisher, model, PARAMS, source, **options), whole)
    assert np.abs(whole - gauss_newton_matrix()).max() > 1e-2


def empirical_matrix():
    """Each sequence's gradient is that of its own mean, and counts by its number of tokens."""
    flat, unravel = ravel_pytree(PARAMS)

    def gradient(inputs, targets, mask):
        weight = jnp.maximum(jnp.sum(mask), 1)
        of = lambda vector: jnp.sum(mask * nll(model(unravel(vector), inputs), targets)) / weight
        return jax.grad(of)(flat)

    rows = jax.vmap(gradient)(*BATCH)
    return np.einsum("np,nq,n->pq", rows, rows, MASK.sum(1)) / MASK.sum()


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_the_empirical_fisher_weighs_each_example(chunk_size):
    expected, build = empirical_matrix(), curvature.empirical_fisher
    operator = build(model, masked, PARAMS, INPUTS, (TARGETS, MASK), chunk_size=chunk_size)
    close(operator, expected)
    close(build(model, nll, PARAMS, INPUTS, TARGETS, MASK, chunk_size=chunk_size), expected)
    source = parts(5, 3, 5)
    close(curvature.stream(curvature.empirical_fisher, model, nll, PARAMS, source), expected)


def test_of_the_empirical_fisher_an_example_has_one_weight():
    several = lambda outputs, targets: (WeightedMean(jnp.sum(outputs), jnp.int32(N)),) * 2
    with pytest.raises(ValueError, match=r"must return one regjax\.WeightedMean"):
        curvature.empirical_fisher(model, several, PARAMS, INPUTS, TARGETS)


def test_weights_of_one_are_the_plain_mean_bit_for_bit():
    mean = lambda params, inputs, targets: jnp.mean(nll(model(params, inputs), targets))

    def ones(params, inputs, targets):
        losses = nll(model(params, inputs), targets)
        return WeightedMean(jnp.sum(losses), jnp.int32(losses.size))

    for chunk_size in (None, 4):
        one = curvature.hessian(mean, PARAMS, INPUTS, TARGETS, chunk_size=chunk_size).dense()
        other = curvature.hessian(ones, PARAMS, INPUTS, TARGETS, chunk_size=chunk_size).dense()
        np.testing.assert_allclose(one, other, atol=3e-8)


@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_the_scale_of_the_weights_changes_nothing(scale):
    one = curvature.hessian(loss_fn, PARAMS, INPUTS, TARGETS, scale * MASK, chunk_size=4)
    close(one, dense(plain))


def test_a_stream_counts_beyond_what_float32_holds():
    """One batch of 2^24 examples, and ninety of one: in float32 2^24 + 1 is 2^24."""
    loss = lambda params, inputs, weights: WeightedMean(
        jnp.sum(weights * (params["w"] * inputs) ** 2), jnp.sum(weights)
    )
    many = (jnp.zeros(1), jnp.float32([2.0**24]))
    one = (jnp.float32([4096.0]), jnp.float32([1.0]))
    source = [many] + [one] * 90
    operator = curvature.stream(curvature.hessian, loss, {"w": jnp.float32(1)}, source)
    expected = 90 * 2 * 4096.0**2 / (2.0**24 + 90)
    np.testing.assert_allclose(operator.dense()[0, 0], expected, rtol=5e-7)
    assert operator.source.num_passes == 2  # one for the weights, one for the product


def test_eigenvalues_of_chunks_are_those_of_the_whole():
    """The largest one, of a quotient of parts twice as large where tokens are few."""
    expected = np.linalg.eigvalsh(dense(plain))[-1]
    for chunk_size in (None, 4):
        operator = curvature.hessian(loss_fn, PARAMS, *BATCH, chunk_size=chunk_size)
        found = curvature.top_eigenpairs(operator, 1, key=jax.random.key(1), tol=1e-5)
        assert abs(found.values[0] - expected) <= found.residual_norms[0] + 1e-6 * expected


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_diagnostics_take_weighted_means(chunk_size):
    other = jax.tree.map(lambda leaf: 1.3 * leaf, PARAMS)
    positions = jnp.array([0.0, 0.5, 1.0])
    losses = diagnostics.interpolate(
        loss_fn, PARAMS, other, *BATCH, positions=positions, chunk_size=chunk_size
    )
    at = lambda t: plain(jax.tree.map(lambda a, b: (1 - t) * a + t * b, PARAMS, other), *BATCH)
    np.testing.assert_allclose(losses, [at(t) for t in (0.0, 0.5, 1.0)], rtol=1e-5)
    probe = diagnostics.line_probe(
        loss_fn, PARAMS, *BATCH, learning_rates=jnp.array([0.1]), chunk_size=chunk_size
    )
    gradient = jax.grad(plain)(PARAMS, *BATCH)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(probe.gradient_norm, norm, rtol=1e-5)


def test_taylor_scores_weigh_the_batches():
    gates = {"hidden": jnp.ones(6)}
    gated = lambda gates, *batch: loss_fn(
        {**PARAMS, "a": PARAMS["a"] * gates["hidden"][None]}, *batch
    )
    own = lambda gates, *batch: plain({**PARAMS, "a": PARAMS["a"] * gates["hidden"][None]}, *batch)
    found = pruning.taylor_scores(gated, gates, *BATCH, batch_size=4)
    squares, weights = [], []
    for i in range(3):
        part = tuple(leaf[4 * i : 4 * i + 4] for leaf in BATCH)
        weights.append(float(part[2].sum()))
        if weights[-1]:
            squares.append(np.square(jax.grad(own)(gates, *part)["hidden"]))
        else:
            squares.append(np.zeros(6))
    expected = np.average(squares, axis=0, weights=weights)
    np.testing.assert_allclose(found.scores["hidden"], expected, rtol=1e-5)


def test_outputs_may_be_trees_with_leaves_that_nothing_depends_on():
    def several(params, inputs):
        outputs = model(params, inputs)
        positions = jnp.broadcast_to(jnp.arange(T)[None], inputs.shape[:2])
        return {"logits": outputs, "positions": positions, "scale": jnp.ones(len(inputs))}

    loss = lambda outputs, batch: masked(outputs["logits"], batch)
    data = (PARAMS, INPUTS, (TARGETS, MASK))
    close(curvature.gauss_newton(several, loss, *data, chunk_size=4), gauss_newton_matrix())
    close(curvature.empirical_fisher(several, loss, *data), empirical_matrix())
    with pytest.raises(TypeError, match="`model_fn` must return one real floating-point array"):
        curvature.fisher(several, PARAMS, INPUTS, key=None, num_samples=None)


def test_aux_is_left_out_by_name():
    with_aux = lambda *arguments: (loss_fn(*arguments), {"accuracy": 0.5})
    operator = curvature.hessian(regjax.without_aux(with_aux), PARAMS, *BATCH, chunk_size=4)
    close(operator, dense(plain))
    with pytest.raises(ValueError, match=r"pass regjax.without_aux\(loss_fn\)"):
        curvature.hessian(with_aux, PARAMS, *BATCH)
    with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\), got a Weighted"):
        curvature.hessian(regjax.without_aux(loss_fn), PARAMS, *BATCH)


@pytest.mark.parametrize(
    ("mask", "found"), [(0 * MASK, "0"), (jnp.nan * MASK, "nan"), (-MASK, r"-\d")], ids=str
)
def test_weights_that_divide_nothing_are_refused(mask, found):
    batch = (INPUTS, TARGETS, mask)
    match = rf"`loss_fn\(\.\.\.\)\.weight` must be (positive|non-negative) and finite, got {found}"
    with pytest.raises(ValueError, match=match):
        curvature.hessian(loss_fn, PARAMS, *batch, chunk_size=4)
    with pytest.raises(ValueError, match=match):
        curvature.stream(curvature.hessian, loss_fn, PARAMS, [batch]).dense()
    with pytest.raises(ValueError, match=r"weight.* must be (positive|non-neg)"):
        curvature.fisher(model, PARAMS, INPUTS, mask, key=None, num_samples=None)


def test_a_weight_is_a_wide_number_that_the_parameters_do_not_move():
    def narrow(params, *batch):
        total, weight = loss_fn(params, *batch)
        return WeightedMean(total, weight.astype(jnp.bfloat16))

    with pytest.raises(TypeError, match="in which counts are exact, got bfloat16"):
        curvature.hessian(narrow, PARAMS, *BATCH)

    def moved(params, *batch):
        total, weight = loss_fn(params, *batch)
        return WeightedMean(total, weight * jnp.sum(params["a"] ** 2))

    with pytest.raises(ValueError, match="must not depend on the parameters"):
        curvature.hessian(moved, PARAMS, *BATCH)
    stopped = lambda params, *batch: moved(jax.lax.stop_gradient(params), *batch)
    constant = lambda p, *batch: WeightedMean(loss_fn(p, *batch).sum, stopped(p, *batch).weight)
    curvature.hessian(constant, PARAMS, *BATCH)
    # Inside of `jit` there are no numbers to look at.
    product = lambda loss: lambda p: curvature.hessian(loss, p, *BATCH, chunk_size=4).matvec(p)
    with pytest.raises(ValueError, match="must not depend on the parameters"):
        jax.jit(product(moved))(PARAMS)
    found, expected = jax.jit(product(constant))(PARAMS), product(constant)(PARAMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


@pytest.mark.parametrize("weights", [jnp.ones((N, T + 1)), jnp.ones((N, T, C)), jnp.float32(1)])
def test_weights_of_another_shape_are_refused(weights):
    with pytest.raises(ValueError, match="`weights` must have a"):
        curvature.fisher(model, PARAMS, INPUTS, weights, key=None, num_samples=None)
    with pytest.raises(ValueError, match=r"must return the loss of each|must have an axis"):
        curvature.gauss_newton(model, nll, PARAMS, INPUTS, TARGETS, weights)


@pytest.mark.parametrize("count", [len, float, jnp.float32, jnp.asarray, np.float64], ids=range(5))
def test_a_weight_may_be_a_number_of_the_program(count):
    number = lambda inputs: count(inputs) if count is len else count(len(inputs))
    loss = lambda params, inputs, targets: WeightedMean(
        jnp.sum(nll(model(params, inputs), targets)) / T, number(inputs)
    )
    mean = lambda params, inputs, targets, mask: jnp.mean(nll(model(params, inputs), targets))
    close(curvature.hessian(loss, PARAMS, INPUTS, TARGETS, chunk_size=4), dense(mean))


def test_a_sum_and_its_weight_are_no_loss_and_aux():
    """The programs are equal, not what they mean."""
    square = lambda params, inputs: jnp.sum((inputs @ params["a"]) ** 2)
    weighted = lambda params, inputs: WeightedMean(square(params, inputs), jnp.float32(N))
    with_aux = lambda params, inputs: (square(params, inputs), jnp.float32(N))
    curvature.hessian(weighted, PARAMS, INPUTS)
    with pytest.raises(ValueError, match="got a tuple of 2"):
        curvature.hessian(with_aux, PARAMS, INPUTS)
    names = lambda first, second: lambda params, inputs: {
        first: inputs[:, 0] @ params["a"], second: inputs[:, 1] @ params["a"] * 2
    }  # fmt: skip
    loss = lambda outputs, targets: jnp.mean(outputs["u"] ** 2)
    build = lambda model: curvature.gauss_newton(model, loss, {"a": PARAMS["a"]}, INPUTS, TARGETS)
    one, other = (build(names(*pair)).dense() for pair in (("t", "u"), ("u", "v")))
    expected = [factor * 2 * jnp.einsum("ni,nj->ij", x, x) / N / 6
                for factor, x in ((4, INPUTS[:, 1]), (1, INPUTS[:, 0]))]  # fmt: skip
    for found, gram in zip((one, other), expected, strict=True):
        np.testing.assert_allclose(found, jnp.kron(gram, jnp.eye(6)), atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_each_example_of_the_empirical_fisher_has_a_loss_of_its_own(chunk_size):
    build = lambda loss: curvature.empirical_fisher(
        model, loss, PARAMS, INPUTS, (TARGETS, MASK), chunk_size=chunk_size
    )
    quotient = lambda outputs, batch: jnp.divide(*masked(outputs, batch))
    at_least_one = lambda outputs, batch: WeightedMean(
        masked(outputs, batch).sum, jnp.maximum(masked(outputs, batch).weight, 1.0)
    )
    for loss in (quotient, at_least_one):
        with pytest.raises(ValueError, match="`output_loss_fn` must be the mean over independent"):
            build(loss)
    build(masked)


@pytest.mark.parametrize("build", [curvature.gauss_newton, curvature.empirical_fisher, "fisher"])
def test_weights_of_a_stream_are_checked_like_those_of_one_piece(build):
    if build == "fisher":
        start = (curvature.stream, curvature.fisher, model, PARAMS)
        options = {"key": None, "num_samples": None}
        batches = [(x, mask) for x, _, mask in parts(4, 9)]
    else:
        start, options, batches = (curvature.stream, build, model, nll, PARAMS), {}, parts(4, 9)
    make = lambda batches: start[0](*start[1:], batches, **options).dense()
    expected = make(batches)
    narrow = [(*batch, mask.astype(jnp.bfloat16)) for *batch, mask in batches]
    truth = [(*batch, np.asarray(mask, bool)) for *batch, mask in batches]
    for other in (narrow, truth):
        np.testing.assert_allclose(make(other), expected, atol=1e-7)
    # In the last batch alone, whose sum is positive still.
    *batch, mask = batches[1]
    with pytest.raises((RuntimeError, ValueError), match="must be non-negative and finite, got -1"):
        make([batches[0], (*batch, mask.at[0, 0].set(-1.0))])


def test_a_run_over_a_weighted_stream_goes_on_whether_or_not_it_was_used(tmp_path):
    start = jax.tree.map(jnp.ones_like, PARAMS)
    make = lambda batches: curvature.stream(curvature.hessian, loss_fn, PARAMS, batches)
    save = curvature.Checkpoint(tmp_path, every=1)
    run = lambda operator, **options: curvature.lanczos(operator, start, 4, **options)

    def stop(done, total, progress):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(parts(4, 9)), checkpoint=save, callback=stop)
    doubled = [(x, y, 2 * mask) for x, y, mask in parts(4, 9)]
    with pytest.raises(ValueError, match="must be of the same problem: `source`"):
        run(make(doubled), checkpoint=save)
    used, done = make(parts(4, 9)), []
    used.matvec(start)
    found = run(used, checkpoint=save, callback=lambda i, *_: done.append(i))
    assert done[0] == 3
    jax.tree.map(np.testing.assert_array_equal, found, run(used))


def test_weights_of_parts_are_looked_at():
    """The sum of all is positive."""
    negative = MASK.at[6].set(-0.1)
    with pytest.raises(ValueError, match=r"\.weight` must be non-negative and finite, got -0\.4"):
        curvature.hessian(loss_fn, PARAMS, INPUTS, TARGETS, negative, chunk_size=1)
    score = lambda loss, mask: pruning.taylor_scores(
        loss, PARAMS, INPUTS, TARGETS, mask, batch_size=1
    )
    with pytest.raises(ValueError, match=r"`gate_loss.*\.weight` must be non-negative and finite"):
        score(loss_fn, negative)

    def at_least_one(params, *batch):
        total, weight = loss_fn(params, *batch)
        return WeightedMean(total, jnp.maximum(weight, 1.0))

    with pytest.raises(ValueError, match=r"`gate_loss\(\.\.\.\)\.weight` must add up over the"):
        score(at_least_one, MASK / 10)
    score(loss_fn, MASK / 10)


def test_numpy_labels_may_be_wider_than_those_of_jax():
    batch = np.asarray(INPUTS), np.asarray(TARGETS, np.int64), np.asarray(MASK)
    close(curvature.hessian(loss_fn, PARAMS, *batch, chunk_size=4), dense(plain))
