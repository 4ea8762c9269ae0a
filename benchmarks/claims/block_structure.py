"""The blocks of a transformer's Hessian have unlike spectra, those of a convolutional net do not.

At the start, as the paper's measure of it, with one block for each weight matrix. Every block's
eigenvalues are divided by its largest magnitude, or a distance would tell scales alone; without
that division it is shown beside it. The transformer is a GPT of one layer and width 32 (6 weight
matrices), the other net has two convolutions and a head (3): far smaller than the paper's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks, _tokens
from regjax import curvature, from_nnx, model_loss, models

_STEPS, _PROBES, _SEQUENCES, _EXAMPLES = 24, 2, 8, 64
_NETWORKS = ("transformer", "convolutions")
_MEASURES = {
    "distance": "eigenvalues over the largest magnitude",
    "raw_distance": "eigenvalues as they are, symmetric-log axis",
}
_DATA: dict[str, tuple[Callable[[], Any], Callable[[], _networks.Split], int]] = {
    "digits": (_tokens.digits, _networks.digits, 5),
    "fashion_mnist": (_tokens.fashion_mnist, _networks.small_fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    data = {"digits": 2} if preset == "smoke" else {name: one[2] for name, one in _DATA.items()}
    return [
        {"data": name, "seed": seed, "network": network}
        for name, count in data.items()
        for seed in range(count)
        for network in _NETWORKS
    ]


def _run(settings: Settings) -> dict[str, float]:
    make = _transformer if settings["network"] == "transformer" else _convolutions
    hessian = make(settings["data"], settings["seed"])
    key = jax.random.key(settings["seed"])
    # Norms and biases are as small as a few numbers: no spectra to speak of.
    matrices = hessian.restricted(lambda path, leaf: leaf.ndim > 1)
    densities, scaled = {}, {}
    for i, (name, block) in enumerate(curvature.by_block(matrices, depth=2).items()):
        density = curvature.spectral_density(
            block, key=jax.random.fold_in(key, i), num_steps=_STEPS, num_probes=_PROBES, deflate=0
        )
        densities[name] = density
        largest = jnp.max(jnp.abs(density.nodes))
        scaled[name] = density._replace(
            nodes=density.nodes / largest,
            alphas=density.alphas / largest,
            betas=density.betas / largest,
            node_error_bound=density.node_error_bound / largest,
        )
    distances = curvature.density_distances(scaled)
    raw = curvature.density_distances(densities, axis_scale="symlog")
    share = curvature.off_diagonal_share(matrices, key=key, num_probes=4, depth=2)
    found = {
        "blocks": float(len(densities)),
        "distance": float(distances.mean),
        "distance_error": float(jnp.sqrt(jnp.mean(distances.standard_error**2))),
        "raw_distance": float(raw.mean),
        "raw_distance_error": float(jnp.sqrt(jnp.mean(raw.standard_error**2))),
        "share": float(share.value),
        "share_error": float(share.standard_error),
    }
    for i, one in enumerate(densities):
        found |= {f"pair {one} | {other}": float(distances.value[i, j])
                  for j, other in enumerate(densities)}  # fmt: skip
    return found


def _transformer(data: str, seed: int) -> Any:
    images = _DATA[data][0]()
    model = _tokens.transformer(images.x.shape[1] - 1, 1, seed, False)
    batch = _tokens.inputs_and_targets(images.x[:_SEQUENCES])
    return curvature.hessian(model_loss(model, _tokens.cross_entropy), model.params, *batch)


def _convolutions(data: str, seed: int) -> Any:
    split = _networks.as_images(_DATA[data][1]())
    net = models.ConvNet(split.x.shape[1:], 10, width=16, depth=2, rngs=nnx.Rngs(seed))
    model, loss = from_nnx(net), _networks.cross_entropy
    batch = split.x[:_EXAMPLES], split.y[:_EXAMPLES]
    return curvature.hessian(model_loss(model, loss), model.params, *batch)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        _on_data(data, own, name)
        for data, own in _claims.groups(records, "data").items()
        for name in _MEASURES
    ]


def _on_data(data: str, records: Sequence[Record], name: str) -> Verdict:
    own = {network: _claims.select(records, network=network) for network in _NETWORKS}
    distance = {network: _claims.numbers(runs, name) for network, runs in own.items()}
    gap, error = _claims.mean_and_error(distance["transformer"] - distance["convolutions"])
    shown = "; ".join(
        f"{network} {distance[network].mean():.3f} (of one run ± "
        f"{_claims.numbers(runs, f'{name}_error').mean():.3f}; share of the Hessian outside of its "
        f"{runs[0]['blocks']:.0f} blocks {_claims.numbers(runs, 'share').mean():.2f})"
        for network, runs in own.items()
    )
    return Verdict(
        f"{_claims.word(gap > 2 * error)} ({data}, {_MEASURES[name]}): a transformer's blocks "
        "differ more",
        f"mean Jensen-Shannon distance of blocks: {shown}; gap {gap:+.3f} ± {error:.3f}",
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    first = records[0]["data"]
    sets = list(_claims.groups(records, "data"))
    figure.set_figheight(4.9)
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    for axes, network in zip(above.subplots(1, 2), _NETWORKS, strict=True):
        runs = _claims.select(records, data=first, network=network)
        pairs = {name for name in runs[0] if name.startswith("pair ")}
        names = list(dict.fromkeys(
            name.removeprefix("pair ").split(" | ")[0] for name in runs[0] if name in pairs
        ))  # fmt: skip
        values = [
            [_claims.numbers(runs, f"pair {one} | {other}").mean() for other in names]
            for one in names
        ]
        image = axes.imshow(values, vmin=0, vmax=0.6, cmap="cividis")
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), short, fontsize=7)
        axes.set_title(
            f"blocks of a {network.replace('convolutions', 'convolutional net')}, {first}",
            fontsize=8,
        )
    bar = above.colorbar(image, ax=above.axes, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("distance of two spectra\n(0: alike)", fontsize=8)
    cases = [(name, data) for name in _MEASURES for data in sets]
    for axes, (name, data) in zip(below.subplots(1, len(cases), sharey=True), cases, strict=True):
        own = _claims.select(records, data=data)
        _figures.dots(axes, own, "network", name, ["trans-\nformer", "convo-\nlutional"])
        axes.set_ylim(0, 0.65)
        scale = "eigenvalues / largest" if name == "distance" else "eigenvalues as they are"
        axes.set_title(f"{_figures.NAMES[data]},\n{scale}", fontsize=7.5)
        _figures.label(axes, y="mean distance" if (name, data) == cases[0] else None)
    return (
        f"Distances are Jensen-Shannon; above of eigenvalues / largest, means over the seeds. "
        f"Below: {_figures.DOTS[0].lower()}{_figures.DOTS[1:]} The claim: the transformer's are "
        "larger."
    )


def _short(name: str) -> str:
    words = {
        "block_0/queries_keys_values": "queries, keys, values", "block_0/attended": "attention out",
        "block_0/widen": "widening", "block_0/narrow": "narrowing", "tokens/embedding": "tokens",
        "positions/embedding": "positions", "layer_0": "convolution 1", "layer_1": "convolution 2",
    }  # fmt: skip
    return words.get(name.removesuffix("/kernel").removesuffix("/layer"), name.split("/")[0])


CLAIM = _claims.Claim(
    name="block_structure",
    paper="Zhang et al. 2024 (arXiv:2402.16788)",
    statement="the spectra of the Hessian's blocks vary dramatically within a transformer and are "
    "alike within a convolutional net",
    printed="in words in the abstract; figure 3 shows BERT and VGG16 at the start, normalised by "
    "each block's 10th largest eigenvalue; the mean Jensen-Shannon distance of the blocks is the "
    "paper's measure",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
