"""Programs for chips that are not here: what is read off their text, and the smallest of them."""

import dataclasses
import importlib.util
import json
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from benchmarks import __main__ as command
from benchmarks import reach
from benchmarks.reach import (
    _account,
    _chips,
    _models,
    _multiplications,
    _plan,
    _programs,
    _tables,
    _text,
)
from benchmarks.reach._case import Case

# One matrix product in a loop of seven turns, with a message of which three steps are written
# down, a stack that is read a row a turn, and branches of which one is for what is rare.
TEXT = """
HloModule example

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%row (stack: f32[7,8,4], i: s32[]) -> f32[8,4] {
  %stack = f32[7,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%slice)
}

%step (part: f32[2,4], whole: f32[8,4]) -> f32[8,4] {
  %part = f32[2,4]{1,0} parameter(0)
  %whole = f32[8,4]{1,0} parameter(1)
  ROOT %gathered = f32[8,4]{1,0} all-gather(%part), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (state: (s32[], f32[8,8], f32[7,8,4])) -> (s32[], f32[8,8], f32[7,8,4]) {
  %state = (s32[], f32[8,8]{1,0}, f32[7,8,4]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %square = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %stack.1 = f32[7,8,4]{2,1,0} get-tuple-element(%state), index=2
  %taken = f32[8,4]{1,0} fusion(%stack.1, %count), kind=kLoop, calls=%row
  %first = f32[8,4]{1,0} fusion(%taken, %taken), kind=kCustom, calls=%step
  %second = f32[8,4]{1,0} fusion(%taken, %first), kind=kCustom, calls=%step.clone
  %product = f32[8,4]{1,0:T(8,128)S(1)} dot(%square, %second), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %reduced = f32[8,4]{1,0} all-reduce(%product), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[8,8]{1,0}, f32[7,8,4]{2,1,0}) tuple(%count, %square, %stack.1)
}

%step.clone (part.1: f32[2,4], whole.1: f32[8,4]) -> f32[8,4] {
  %part.1 = f32[2,4]{1,0} parameter(0)
  %whole.1 = f32[8,4]{1,0} parameter(1)
  ROOT %gathered.1 = f32[8,4]{1,0} all-gather(%part.1), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%condition (state.2: (s32[], f32[8,8], f32[7,8,4])) -> pred[] {
  %state.2 = (s32[], f32[8,8]{1,0}, f32[7,8,4]{2,1,0}) parameter(0)
  %count.2 = s32[] get-tuple-element(%state.2), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%count.2, %bound), direction=LT
}

ENTRY %main (square.3: f32[8,8], stack.3: f32[7,8,4]) -> f32[8,8] {
  %square.3 = f32[8,8]{1,0} parameter(0)
  %stack.3 = f32[7,8,4]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %state.3 = (s32[], f32[8,8]{1,0}, f32[7,8,4]{2,1,0}) tuple(%start, %square.3, %stack.3)
  %loop = (s32[], f32[8,8]{1,0}, /*index=2*/f32[7,8,4]{2,1,0}) while(%state.3), condition=%condition, body=%body
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs_and_a_message_once():
    found = _account.account(TEXT, 4)
    assert found.operations == 7 * 2 * 8 * 4 * 8
    gathered, reduced = found.collectives
    assert gathered == _account.Collective("all-gather", 7, 7 * 128, 4, 7 * 128)
    assert reduced == _account.Collective("all-reduce", 7, 7 * 128, 2, 7 * 128)
    assert found.largest == 128
    assert found.sent == 7 * 128 * 3 / 4 + 2 * 7 * 128 / 2
    # A row of the stack in and out; the message's own buffers; the square, what was gathered and,
    # from the chip's own memory, nothing; what is reduced and its sum.
    assert found.num_bytes <= 7 * (2 * 128 + 4 * 128 + (256 + 128) + 128)
    assert found.num_bytes >= 7 * (2 * 128 + (256 + 128) + 128)


@pytest.mark.parametrize(
    "add",
    [
        "s32[] add(%count, %two)", "s32[] fusion(%count), kind=kLoop, calls=%plus",
        "s32[] fusion(%count, %square), kind=kLoop, calls=%plus",
    ],
)  # fmt: skip
def test_two_turns_that_the_compiler_made_one_count_once(add):
    """Seven turns by two are four."""
    next_ = "  ROOT %next = (s32[], f32[8,8]{1,0}, f32[7,8,4]{2,1,0}) tuple("
    assert TEXT.count(next_ + "%count,") == 1
    plus = """
%plus (n: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %both = s32[] constant(2)
  ROOT %more = s32[] add(%n, %both)
}

%condition ("""
    steps = f"  %two = s32[] constant(2)\n  %counted = {add}\n"
    text = TEXT.replace(next_ + "%count,", steps + next_ + "%counted,")
    text = text.replace("\n%condition (", plus)
    found = _account.account(text, 4)
    assert found.operations == 4 * 2 * 8 * 4 * 8
    assert [each.num_messages for each in found.collectives] == [4, 4]


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ("[4,2]<=[8]", 2), ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", 2),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2), ("{}", 8),
    ],
)  # fmt: skip
def test_how_many_chips_take_part_in_a_message(groups, number):
    text = TEXT.replace("replica_groups={{0,1},{2,3}}", f"replica_groups={groups}")
    found = _account.account(text, 8).collectives
    assert next(each.num_chips for each in found if each.kind == "all-reduce") == number


def test_the_operations_are_those_of_the_formula():
    """Of a compiled program of this machine, in and out of a loop, and of convolutions."""

    def run(matrix, image, kernel):
        turn = lambda carry, _: (jnp.tanh(carry @ matrix), None)
        looped = jax.lax.scan(turn, jnp.ones((16, 16)), None, length=5)[0]
        convolved = jax.lax.conv_general_dilated(image, kernel, (2, 2), ((0, 0), (0, 0)))
        return looped, convolved

    arguments = jnp.ones((16, 16)), jnp.ones((2, 3, 9, 9)), jnp.ones((5, 3, 3, 3))
    text = jax.jit(run).lower(*arguments).compile().as_text()
    assert _account.account(text, 1).operations == 5 * 2 * 16**3 + 2 * 2 * 5 * 4 * 4 * 3 * 9


def test_products_that_are_written_as_convolutions_with_padding():
    """As TPU's compiler has a batch of products: twelve, of which each meets one of the others."""
    line = _text._instruction(
        "c",
        "f32[12,64,64]{2,1,0} convolution(%a, %b), window={size=12 stride=11 lhs_dilate=12}, "
        "dim_labels=0bf_0oi->0bf",
        False,
    )
    found = _multiplications.of_convolution(line, (12, 64, 8), (12, 64, 8), (12, 64, 64))
    assert found == 2 * 12 * 64 * 64 * 8


@pytest.mark.parametrize(
    ("kind", "result", "operands"),
    [
        ("convForward", "2,4,4,7", ("2,9,9,3", "7,3,3,3")),
        ("convBiasActivationForward", "2,4,4,7", ("2,9,9,3", "7,3,3,3", "7")),
        ("convBackwardInput", "2,9,9,3", ("2,4,4,7", "7,3,3,3")),
        ("convBackwardFilter", "7,3,3,3", ("2,9,9,3", "2,4,4,7")),
    ],
)
def test_the_three_convolutions_of_cudnn_multiply_alike(kind, result, operands):
    given = [f"  %p{i} = f32[{shape}] parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    text = "\n".join([
        "ENTRY %main (p0: f32[]) -> f32[] {", *given,
        f"  ROOT %c = (f32[{result}]{{3,2,1,0}}, u8[0]{{0}}) custom-call({names}), "
        "window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, "
        f'custom_call_target="__cudnn${kind}"', "}",
    ])  # fmt: skip
    assert _account.account(text, 1).operations == 2 * 2 * 4 * 4 * 7 * 9 * 3


@pytest.mark.parametrize(
    "line",
    [
        "%part = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%whole), "
        "slice={[0:16], [0:8]}",
        "%part = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%whole), "
        "calls=%sliced",
    ],
)
def test_of_an_array_that_is_fetched_in_parts_the_part_moves(line):
    """As a program and the files that are written on the way have it."""
    text = f"""
%sliced (p: f32[64,8]) -> f32[16,8] {{
  %p = f32[64,8]{{1,0}} parameter(0)
  ROOT %slice.1 = f32[16,8]{{1,0:S(1)}} slice(%p), slice={{[0:16], [0:8]}}
}}

ENTRY %main (whole: f32[64,8]) -> f32[16,8] {{
  %whole = f32[64,8]{{1,0}} parameter(0)
  {line}
  ROOT %done = f32[16,8]{{1,0:S(1)}} slice-done(%part)
}}
"""
    assert _account.account(text, 1).num_bytes == 4 * 16 * 8


def test_parameters_are_divided_and_nothing_is_allocated():
    mesh = _chips.mesh_here()
    problem = _models.problem_on(mesh, _models.SIZES["GPT 124M"])
    assert 1.24e8 < problem.num_params < 1.25e8
    leaves = jax.tree.leaves((problem.params, problem.x, problem.y))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    kernel = problem.params["blocks"]["widen"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, _chips.AXIS)


def test_a_small_model_is_divided_within_groups_and_its_vectors_over_all_chips():
    devices = jax.devices()[:1] * 8
    shape = lambda most_shards: tuple(_chips._in_groups(devices, most_shards).shape.values())
    assert [shape(None), shape(4), shape(16)] == [(1, 8), (2, 4), (1, 8)]
    names = (_chips.GROUPS, _chips.AXIS)
    mesh = AbstractMesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)
    problem = _models.problem_on(mesh, _models.SIZES["tiny"])
    kernel = problem.params["blocks"]["widen"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 128, 512 // 4)
    assert problem.x.sharding.shard_shape(problem.x.shape) == (1, 128)
    space = _programs.operator_of("Hessian product", problem, mesh).space
    assert space._shares.num_columns == problem.num_params / 8


def test_a_network_with_running_statistics_is_traced():
    size = _models.SIZES["ResNet 11M"]
    small = dataclasses.replace(size, options={"image_size": 8, "widths": (4, 8)}, per_chip=2)
    problem = _models.problem_on(_chips.mesh_here(), small)
    program = _programs.program_of("gradient", problem, _chips.mesh_here())
    outputs = jax.eval_shape(program.function, *program.arguments)
    assert jax.tree.structure(outputs) == jax.tree.structure(problem.params)


def test_a_solver_of_shapes_is_traced_as_one_of_arrays():
    mesh = _chips.mesh_here()
    problem = _models.problem_on(mesh, dataclasses.replace(_models.SIZES["tiny"], per_chip=2))
    for name in ("Lanczos step", "density step", "SAM step", "Gauss-Newton product"):
        program = _programs.program_of(name, problem, mesh, num_steps=8)
        outputs = jax.eval_shape(program.function, *program.arguments)
        like = program.arguments[program.donated[0]] if program.donated else problem.params
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert shapes(outputs) == shapes(like)


def record(program, chips=4, **changes):
    case = Case("GPT 124M", "v5e", chips, program)
    return {
        **case.facts, "parameters": 7, "compiled": True, "seconds_to_compile": 12.0,
        "bytes": {"total": 2e9}, "fits": True, "operations": 3e12, "bytes_moved": 4e9,
        "bytes_sent": 5e8, "largest_collective": 1, "collectives": [],
        "roofline_seconds": {"operations": 0.1, "memory": 0.2, "network": 0.3, "largest": 0.3},
        **changes,
    }  # fmt: skip


def test_ratios_are_to_the_gradient_of_the_same_model_on_the_same_chips(tmp_path):
    records = [
        record("gradient"), record("Hessian product", operations=6e12),
        record("Hessian product", chips=16), record("SAM step", compiled=False, reason="x"),
    ]  # fmt: skip
    found = _tables.with_ratios(records)
    assert found[1]["over_gradient"] == {"operations": 2, "bytes_moved": 1, "bytes_sent": 1}
    assert found[2]["over_gradient"] == found[3]["over_gradient"] == {}
    (tmp_path / "reach.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    reach.conclude(tmp_path)
    table = (tmp_path / "reach.md").read_text()
    assert "| GPT 124M | 4 v5e | Hessian product | 12 s | 2.00 | 6 | 2.00 |" in table
    assert "Compiled, not run" in table
    assert (tmp_path / "reach.png").stat().st_size > 10_000


def test_a_case_that_takes_too_long_is_stopped_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(_chips, "missing", lambda chip: None)
    found = reach.record_of(Case("tiny", "v5e", 4, "gradient"), 0.2)
    assert not found["compiled"]
    assert found["reason"] == "not compiled in 0 s"
    monkeypatch.setattr(_chips, "missing", lambda chip: "libtpu")
    assert command.main(["reach", "--only", "gradient"]) == 1
    assert "libtpu is not installed" in capsys.readouterr().out


def test_convolutions_for_a_gpu_need_its_library(monkeypatch):
    monkeypatch.setattr(_chips, "missing", lambda chip: None)
    monkeypatch.setattr(_chips, "has_cudnn", lambda: False)
    found = reach.record_of(Case("ResNet 11M", "H100", 8, "gradient"), 60)
    assert "cudnn" in found["reason"]


def test_the_buffers_of_a_plan():
    """Of the large memory alone; of what is donated the memory counts once, as an argument."""
    buffers = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <1 add @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, maybe-live-out:
allocation 2: size 1024, parameter 0, shape |f32[2,128]| at ShapeIndex {}:
allocation 3: size 2048, parameter 1, shape |f32[4,128]| at ShapeIndex {}, maybe-live-out:
allocation 4: size 256, output shape is |(f32[2,128], f32[4,128])|, maybe-live-out:
allocation 5: size 8192, preallocated-temp:
allocation 6: size 99999, color 1, preallocated-temp:
"""
    assert _plan.bytes_of(buffers) == {
        "arguments": 3072, "temporaries": 8704, "results": 4352, "total": 16128
    }  # fmt: skip


class Lowered:
    """A compiler that writes its files a piece at a time, and then takes long or refuses."""

    def __init__(self, files, refusal=None):
        self.files, self.refusal, self.is_over = files, refusal, threading.Event()

    def compile(self, compiler_options):
        folder = pathlib.Path(compiler_options["xla_dump_to"])
        for name, content in self.files:
            (folder / f"module_1.f.after_optimizations{name}.txt").write_text(content)
            time.sleep(3 * _plan._PAUSE)
        if self.refusal is not None:
            raise self.refusal
        self.is_over.wait()


def test_a_plan_is_read_when_all_of_it_is_written():
    text, name = "ENTRY %main () -> f32[] {\n  ...\n}\n\n", "_after_buffer_assignment"
    buffers = ("-buffer-assignment", "allocation 0: size 512, preallocated-temp:")
    lowered = Lowered([buffers, (name, text[:-5]), (name, text)])
    found = _plan.plan(lowered)
    assert found.text == text
    assert found.num_bytes["total"] == 512
    assert not lowered.is_over.is_set()  # nobody waits for the instructions
    lowered.is_over.set()
    with pytest.raises(MemoryError, match="does not fit"):
        _plan.plan(Lowered([buffers], MemoryError("does not fit")))


def test_what_was_planned_is_shown_as_that_and_compiled_on_request(tmp_path, monkeypatch):
    planned = record("gradient", compiled=False, planned=True)
    assert "| 12 s (planned) | 2.00 |" in _tables.table(_tables.with_ratios([planned]), [])
    assert "(planned)" in reach.summary(planned)
    asked = []

    def record_of(case, limit):
        asked.append(case.planned)
        return record("gradient")

    monkeypatch.setattr(reach, "record_of", record_of)
    monkeypatch.setattr(reach, "conclude", lambda out: None)
    (tmp_path / "reach.jsonl").write_text(json.dumps(planned) + "\n")
    run = ["reach", "--preset", "full", "--only", planned["case"], "--out", str(tmp_path)]
    assert command.main([*run, "--plan"]) == 0
    assert asked == []
    assert command.main(run) == 0
    assert asked == [False]


def test_redraw_writes_table_and_figure_of_the_records(tmp_path):
    for name in ("reach.jsonl", "reach_measured.jsonl"):
        (tmp_path / name).write_bytes((command._RESULTS / name).read_bytes())
    assert command.main(["reach", "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "reach.md").read_text() == (command._RESULTS / "reach.md").read_text()
    assert 10_000 < (tmp_path / "reach.png").stat().st_size < 150_000


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra `reach`, is not here"
)
def test_the_smallest_case_compiles_for_four_chips():
    case = Case("tiny", "v5e", 4, "Hessian product")
    found = reach.record_of(case, 600)
    assert found["compiled"], found["reason"]
    # A batch of four, one on each chip; the count of the trace, by the formula.
    assert found["operations"] == pytest.approx(1.34e9, rel=0.01)
    assert found["fits"]
    # Each chip gathers what it multiplies with, and never a whole vector at once.
    assert found["largest_collective"] < 4 * found["parameters"] / 4


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra `reach`, is not here"
)
@pytest.mark.parametrize("program", ["Hessian product", "density step"])
def test_the_plan_of_a_program_is_what_is_compiled(program):
    case = Case("tiny", "v5e", 4, program)
    planned, compiled = (
        reach.record_of(case._replace(planned=planned), 600) for planned in (True, False)
    )
    assert planned["planned"], planned["reason"]
    for name in ("operations", "bytes_moved", "bytes_sent", "collectives", "largest_collective"):
        assert planned[name] == compiled[name]
    for name in ("arguments", "results"):
        assert planned["bytes"][name] == compiled["bytes"][name]


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin, of the extra `reach-cuda`, is not here",
)
def test_what_a_branch_gives_stays_divided():
    """Left alone, XLA for CUDA has the rows that come out of one on each chip, whole."""
    found = reach.record_of(Case("tiny", "H100", 8, "density step"), 600)
    assert found["compiled"], found["reason"]
    vector = 4 * found["parameters"] / 8
    assert found["bytes"]["total"] < (2 * 43 + 8) * vector
    assert found["largest_collective"] < 2 * vector
