"""Figures of records: their formats, their widths, and the names in them."""

import re

import numpy as np
import pytest

from regjax import plots
from regjax.experiments import LandscapeSettings, _figure, _folder

POSITIONS = np.linspace(-1, 1, 5)


def record_of(**options):
    settings = LandscapeSettings(**options)
    losses = 0.1 + POSITIONS[:, None] ** 2 + 2 * POSITIONS[None] ** 2
    probe = {"losses": [1.0, 2.0], "gradient_distances": [0.1, 0.2], "smoothness": [1.0, 3.0]}
    return {
        "settings": _folder.all_options(settings),
        "surface": {"positions": POSITIONS.tolist(), "losses": losses.tolist()},
        "probes": [{"epochs": epochs, **probe} for epochs in range(3)],
    }


DRAW = {
    "surface": lambda path, record: _figure.draw_surface(path, record),
    "probes": lambda path, record: _figure.draw_probes(path, record),
    "compare": lambda path, record: _figure.draw_landscapes(path, {"none": record, "b": record}),
}


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_figure_has_the_format_of_its_name_and_the_same_bytes_each_time(name, kind, tmp_path):
    start = {"png": b"\x89PNG", "pdf": b"%PDF-", "svg": b"<?xml"}[kind]
    contents = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        DRAW[name](folder / f"figure.{kind}", record_of(figure=kind))
        contents |= {path.read_bytes() for path in folder.iterdir()}
    assert all(content.startswith(start) for content in contents)
    assert len(contents) == (2 if name == "compare" else 1)


@pytest.mark.parametrize(("width", "inches"), [("column", 3.3), ("page", 6.8)])
def test_a_figure_has_the_width_that_is_asked_for(width, inches, tmp_path):
    for name, draw in DRAW.items():
        draw(tmp_path / f"{name}.svg", record_of(figure_width=width))
    for path in tmp_path.iterdir():
        points = float(re.search(r'width="([\d.]+)pt"', path.read_text())[1])
        assert points == pytest.approx(72 * inches, abs=0.1), path


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "mlp, no normalization, sgd"),
        ({"normalization": "group_plus", "optimizer": "adam"}, "mlp, group plus norm, adam"),
        (
            {"model": "convnet", "transformation": "entropy_sgd", "init": "gradinit"},
            "convnet, no normalization, sgd with entropy sgd with gradinit",
        ),
    ],
)
def test_titles_name_the_network(options, name, tmp_path, monkeypatch):
    titles = []
    for draw in ("surface_figure", "probe_figure"):
        original = getattr(plots, draw)

        def kept(panels, original=original, **options):
            titles.extend(panel.label for panel in panels)
            return original(panels, **options)

        monkeypatch.setattr(plots, draw, kept)
    _figure.draw_surface(tmp_path / "a.svg", record_of(**options))
    _figure.draw_probes(tmp_path / "b.svg", record_of(**options))
    assert titles == [name, name]


def test_an_item_that_is_none_says_of_what():
    assert _figure._label("none") == "no normalization"
    assert _figure._label("sam,normalization=none") == "sam, no normalization"
    assert _figure._label("sam,rho=0.1") == "sam, rho=0.1"
