"""The growth of time and memory: exponents, the arithmetic beside them, and what is recorded."""

import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import _timing, growth
from benchmarks.growth import _measure, _points, _tools
from benchmarks.growth._arithmetic import arithmetic
from benchmarks.speed import _competitors

PAGE = pathlib.Path(__file__).parents[1] / "docs/benchmarks/growth.md"


def record(point, exponent, **changes):
    size = point.value
    numbers = {"seconds": 0.1 + size**exponent, "compile": 3.0, "bytes": 7.0 * size}
    asked = {"seconds": 2.0 * size, "compile": 200.0, "bytes": 5.0 * size}
    record = {
        "case": point.name, **point._asdict(), "parameters": point.num_parameters, "runs": True,
        "tools": {"regjax": numbers}, "arithmetic": asked, "load": [0.0, 0.0],
    }  # fmt: skip
    return {**record, **changes}


def examples():
    return [point for point in _points.points("cpu") if point.axis == "examples"]


@pytest.mark.parametrize(("exponent", "met"), [(1.0, True), (1.05, True), (1.3, False)])
def test_a_curve_that_is_steeper_than_its_arithmetic_misses(exponent, met):
    found = growth.slopes([record(point, exponent) for point in examples()])
    assert [(slope.axis, slope.measure) for slope in found] == [
        ("examples", "seconds"), ("examples", "compile"), ("examples", "bytes")
    ]  # fmt: skip
    assert found[0].tools["regjax"] == pytest.approx(exponent, abs=1e-3)
    assert found[0].arithmetic == pytest.approx(1)
    assert [slope.met for slope in found] == [met, True, True]
    assert ("**missed**" in growth.table(found)) is not met


def test_the_slope_is_that_of_the_last_three_points():
    records = [record(point, 1.0) for point in examples()]
    records[0]["tools"]["regjax"]["seconds"] = 1e9
    assert growth.slopes(records)[0].tools["regjax"] == pytest.approx(1, abs=1e-3)


def test_the_arithmetic_of_a_product():
    point = _points.Point("m", 5, width=16, depth=1, examples=32, k=0, products=5)
    found = arithmetic(point)
    # y, y', dw': three products of matrices where the inputs have no derivatives. Of the head y,
    # two for y', two for dx' and two for dw'.
    matrices = 2 * 32 * (3 * 64 * 16 + 7 * 16 * 10)
    assert found["operations"] == 5 * matrices
    row = 4 * (65 * 16 + 17 * 10)
    assert found["bytes_moved"] == row * (5 * 6 + 5 + 5 * 3) + 5 * 2 * 4 * 32 * (16 + 10)
    more = arithmetic(point._replace(products=10))
    assert more["operations"] == 10 * matrices
    assert more["bytes"] - found["bytes"] == 5 * row


def test_points_have_the_sizes_that_they_are_named_for():
    for point in _points.points("cpu"):
        shapes = jax.tree.leaves(_points.shapes_of(point).params)
        size = sum(leaf.size for leaf in shapes)
        assert size == point.num_parameters
        if point.axis == "parameters":
            assert size == pytest.approx(point.value, rel=0.01)


@pytest.mark.parametrize("wrong", [{"largest": 1.1}, {"products": 19}, {"largest": np.nan}])
def test_a_wrong_answer_is_not_timed(monkeypatch, wrong):
    calls = []

    def run():
        calls.append(None)
        return _tools.Answer(**{"largest": 1.0, "products": 20, **wrong})

    tool = _tools.Tool(run, 1.0, None)
    monkeypatch.setattr(_tools, "tools", lambda *arguments: [("regjax", tool)])
    monkeypatch.setattr(_measure, "_rayleigh", lambda problem, answer: 1.0)
    point = _points.Point("depth", 1, width=4, depth=1, examples=4)
    with pytest.raises(_timing.WrongAnswer, match="depth / 1: regjax is off by"):
        _measure.record_of(point, cold=False)
    assert len(calls) == 1


def test_hidden_layers_are_in_the_order_of_their_numbers():
    params = {f"layer_{i}": None for i in range(12)} | {"head": None}
    assert _competitors._hidden(params) == [f"layer_{i}" for i in range(12)]


def test_what_is_recorded_is_not_measured_again(tmp_path, monkeypatch, capsys):
    asked = []

    def records_of(points, *, here):
        for point in points:
            asked.append(point.value)
            yield record(point, 1.0)

    monkeypatch.setattr(growth, "records_of", records_of)
    arguments = ["growth", "--preset", "cpu", "--only", "examples", "--out", str(tmp_path)]
    assert command.main(arguments) == command.main(arguments) == 0
    assert asked == [256, 1024, 4096, 16384]
    lines = (tmp_path / "growth.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines] == asked
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "| examples | warm call | 1.00 | 1.00 | met |" in capsys.readouterr().out
    assert command.main(["growth", "--only", "nothing"]) == 2


def test_the_page_has_the_table_of_the_records(tmp_path, capsys):
    name = "growth.jsonl"
    (tmp_path / name).write_bytes((command._RESULTS / name).read_bytes())
    assert command.main(["growth", "--redraw", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() in PAGE.read_text()
    assert 10_000 < (tmp_path / "growth.png").stat().st_size < 300_000


def test_smoke_measures_a_point(tmp_path, capsys):
    assert command.main(["growth", "--out", str(tmp_path)]) == 0
    assert "parameters / 1000: regjax" in capsys.readouterr().out
    (line,) = (tmp_path / "growth.jsonl").read_text().splitlines()
    assert json.loads(line)["tools"]["regjax"]["products"] == 20
    assert not (tmp_path / "growth.png").exists()  # one point has no slope
