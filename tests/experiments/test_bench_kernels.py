"""The bench of the hot scans: what is wrong is not timed, rows and report have what they promise."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import kernels, kernels_cases, kernels_gate, kernels_report, measure, memory, training
from experiments.bench.kernels_cases import FAMILIES, MATRICES, SMALL, Shape
from experiments.bench.kernels_report import latest
from experiments.bench.measure import Compiled, Quartiles, Rates, Work
from seqmodels.operators import kernels as families_kernels
from seqmodels.scan import auto
from seqmodels.scan.auto import Rule

KEYS = ("device", "family", "implementation", "shape", "ms_forward", "ms_forward_backward", "floor_ms")


def test_documents_fill_a_row_and_are_of_mixed_lengths() -> None:
    starts = Shape(1, 8192, 16, 128, documents=16).starts()
    sizes = np.diff([*starts, 8192])
    assert starts[0] == 0
    assert len(sizes) == 16
    assert 8 < sizes.max() / sizes.min() <= 16.5
    assert str(MATRICES[-1]) == "1x8192x16x128, 16 documents"


def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures mean nothing."""
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: measure.side_by_side(runs, budget=0, least=1))


def test_rows_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few_turns(monkeypatch)
    out = tmp_path / "cpu.jsonl"
    bench.main(["kernels", "--quick", "--shapes", "diagonal 2x256", "head 1x256", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = [row for row in rows if "note" not in row]
    assert [(row["family"], row["implementation"]) for row in timed] == [
        ("outer, a decay per head", "XLA chunked"),
        *(("diagonal", name) for name in ("XLA auto", "XLA sequential", "XLA chunked", "XLA auto" + kernels.PER_CORE)),
        ("diagonal", "associative_scan"),
    ]
    for row in timed:
        assert all(row[key] is not None for key in KEYS)
        assert row["ratio"] == pytest.approx(row["ms_forward"] / row["floor_ms"])
        assert row["error"] < kernels_gate.TOLERANCE["float32"]
        assert (row["difference"] is None) == (row["implementation"] == "XLA chunked")
        assert row["floor_ms"] == pytest.approx(max(share[0] for share in row["shares"].values()) * row["ms_forward"])
        assert (row["exponentials_ms"] is not None) == (row["family"] == "diagonal")
        assert set(row["shares"]) == {"copy"} | ({"product"} if row["family"] != "diagonal" else set())
        assert row["copy_gb_s"] == row["rates"]["copy"] / 1e9  # measured once
    assert {(row["family"], row["implementation"]) for row in rows if "note" in row} == {
        ("outer, a decay per head", "Pallas"),
        ("outer, a decay per head", "XLA chunked" + kernels.PER_CORE),
        ("outer, a decay per head", "associative_scan"),
        ("diagonal", "Pallas"),
    }
    text = (tmp_path / "cpu.md").read_text()
    assert "**No GPU or TPU figure was taken.**" in text
    assert "| 1 | diagonal | 2x256x32 | associative_scan |" in text
    assert f"a copy moves {timed[0]['copy_gb_s']:.1f} GB/s" in text
    assert "- associative_scan (run 1), left out: takes no documents: outer, a decay per head 1x256x2x32" in text
    assert "- cpu cpu: outer, a decay per head, 2x256x2x32\n" in text
    assert rows[0]["device"] in text
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert "written: " in capsys.readouterr().out


def test_one_that_raises_costs_its_own_row_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While compiling, or while running; a refusal of what cannot be served is noted and no failure."""
    few_turns(monkeypatch)

    def compiling(*_: Any) -> Any:
        raise NotImplementedError("no such lowering\nwith details")

    def running(*_: Any) -> Any:
        raise MemoryError

    def refusing(*_: Any) -> Any:
        raise ValueError("serves TPUs alone")

    def functions(*_: Any) -> dict[str, Any]:
        return {"Pallas": compiling, "XLA other": refusing, "XLA auto": kernels_cases.diagonal_scan}

    monkeypatch.setattr(kernels, "_functions", functions)
    monkeypatch.setattr(kernels, "cases", lambda quick: [(FAMILIES[1], Shape(1, 16, 1, 8))])
    original = kernels._measured
    peer = types.SimpleNamespace(inputs=lambda *x: x, made=running, to_ours=None)
    monkeypatch.setattr(kernels, "_measured", lambda *x: original(*x[:-1], {"peer": peer}))
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as stopped:
        bench.main(["kernels", "--quick", "--out", str(out)])
    assert stopped.value.code == 1
    rows = {row["implementation"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["XLA auto"]["ms_forward"] > 0
    assert {name: (row["note"], row.get("failed")) for name, row in rows.items() if "note" in row} == {
        "Pallas": ("NotImplementedError: no such lowering", True),
        "peer": ("MemoryError: ", True),
        "XLA other": ("serves TPUs alone", None),
    }
    told = capsys.readouterr().err
    assert "2 failed\n  diagonal 1x16x8, Pallas: NotImplementedError: no such lowering\n" in told


def test_what_does_not_fit_is_left_out_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "there", lambda: 10_000.0)
    monkeypatch.setattr(kernels, "_arrays", lambda *_: pytest.fail("made"))
    ours = {"XLA auto": kernels_cases.diagonal_scan}
    monkeypatch.setattr(kernels, "_functions", lambda *_: ours)
    rows = list(kernels._measured(FAMILIES[1], Shape(1, 64, 1, 32), "float32", 0, {}))
    assert [(row["implementation"], row["note"]) for row in rows] == [
        ("XLA auto", "left out: needs about 0.0 GB, 0.0 are there")
    ]


def test_the_memory_that_is_there() -> None:
    memory.there.cache_clear()
    assert 1e8 < memory.there() < 1e14


def test_long_scans_on_a_cpu_say_what_they_leave_out() -> None:
    assert kernels._functions(FAMILIES[1], FAMILIES[1].shapes[0])["XLA chunked"] == (
        "left out: without products a chunk form takes minutes on a CPU"
    )
    found = kernels._functions(FAMILIES[0], MATRICES[0])
    assert found["associative_scan"] == "left out: the states of all steps alone are 51.5 GB"
    assert callable(found["XLA chunked" + kernels.PER_CORE])
    (delta,) = (family for family in FAMILIES if family.name == "delta, gated")
    assert kernels._functions(delta, MATRICES[3])["associative_scan"] == (
        "left out: needs K x K transitions of all steps and their products, 2.1 GB with states"
    )
    assert kernels._functions(FAMILIES[-1], FAMILIES[-1].shapes[0])["associative_scan"] == (
        "left out: the states of all steps alone are 2.1 GB"
    )


def test_under_the_name_of_xla_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table of kernels says."""

    def asked(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a kernel was asked for")

    monkeypatch.setattr(families_kernels, "_refuse", asked)
    table = tuple(Rule("pallas", device="cpu", family=family) for family in ("diagonal", "outer"))
    monkeypatch.setattr(auto, "KERNELS", table)
    with pytest.raises(RuntimeError, match="a kernel was asked for"):
        kernels_cases.diagonal_scan(np.zeros((1, 8, 4), np.float32), np.zeros((1, 8, 4), np.float32))
    few_turns(monkeypatch)
    rows = list(kernels._measured(FAMILIES[1], Shape(1, 64, 1, 8), "float32", 0, {}))
    assert [row["implementation"] for row in rows if "note" not in row][:2] == ["XLA auto", "XLA sequential"]
    monkeypatch.setattr(memory, "FAMILIES", FAMILIES[:1])
    monkeypatch.setattr(training, "MODELS", ())
    monkeypatch.setattr(memory, "compiled", lambda function, *x: jax.eval_shape(function, *x) and Compiled(None, 1, 1))
    assert len(list(memory.rows(quick=True, seed=0))) == 2
    assert auto.KERNELS is table


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        pytest.param(family, wrong, marks=[] if family is FAMILIES[0] else pytest.mark.slow)
        for family in FAMILIES
        for wrong in ("output", "gradients")
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_wrong_is_not_timed(family: kernels.Family, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one in a hundred, in the output or in the gradient of the second input alone."""
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    kind = family.name.split(",")[0]
    names = {"outer": "gated_linear_attention", "delta": "delta_rule", "exponential": "mlstm_scan"}
    function = "sigmoid_scan" if "sigmoid" in family.name else names.get(kind, f"{kind}_scan")
    original = getattr(kernels_cases, function)

    def off(*inputs: Any, **options: Any) -> Any:
        if wrong == "output":
            out, states = original(*inputs, **options)
            return 1.01 * out, states
        first, second, *rest = inputs
        bent = 1.01 * second - 0.01 * jax.lax.stop_gradient(second)  # the same value
        return original(first, bent, *rest, **options)

    shape = kernels_cases.QUICK.get(family.name, SMALL)[-1]
    good = list(kernels._measured(family, shape, "float32", 0, {}))
    assert good[0]["error"] < 1e-4
    monkeypatch.setattr(kernels_cases, function, off)
    wrong_rows = [row for row in kernels._measured(family, shape, "float32", 0, {}) if row.get("failed")]
    ours = {row["implementation"] for row in good if "error" in row} - {"associative_scan"}
    assert {row["implementation"] for row in wrong_rows} == ours
    for row in wrong_rows:
        assert re.search(r"AssertionError: .* is off by .* not timed", row["note"])


def test_sigmoid_gates_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the bench compares them, outputs, final states and gradients; the kernel for TPUs is interpreted here, and
    that for GPUs traced."""
    (family,) = (family for family in FAMILIES if family.name == "exponential, sigmoid gates")
    monkeypatch.setattr(families_kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "on_hopper", lambda: True)  # or "Pallas" is left out
    monkeypatch.setattr(kernels, "side_by_side", lambda runs, **_: dict.fromkeys(runs, Quartiles(1, 1, 1)))
    shape = Shape(1, 100, 2, 16, documents=3)
    rows = {row["implementation"]: row for row in kernels._measured(family, shape, "float32", 0, {})}
    assert "note" not in rows["Pallas"]
    assert 0 < rows["Pallas"]["difference"] < 1e-4
    monkeypatch.setattr(families_kernels, "on_hopper", lambda: True)
    shape = Shape(1, 100, 2, 64, documents=3)
    traced = lambda kind: jax.eval_shape(
        kernels._functions(family, shape)["Pallas"], *kernels_cases.structs(family, shape, kind)
    )
    assert traced("bfloat16")[0].dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"chunk_sigmoid: .*float32"):
        traced("float32")


def row_of(implementation: str, time: str, milliseconds: float = 1.0, **more: Any) -> dict[str, Any]:
    """`time`: of the day."""
    row = {"bench": "kernels", "family": "diagonal", "shape": "8x8192x4096", "dtype": "float32"}
    row |= {"time": f"2026-11-29T{time}:00:00+0000"}
    row |= {"device": "cpu cpu x 1, 2 cores", "command": "c", "commit": "0", "implementation": implementation}
    row |= {"ms_forward": milliseconds, "ms_forward_backward": 2 * milliseconds, "copy_gb_s": 20.0}
    return row | {"shares": {"copy": [0.246 / milliseconds, 0.0011]}} | more


def test_the_rows_of_a_shapes_newest_run_count() -> None:
    old = [row_of("XLA auto", "01", 4.0), row_of("XLA sequential", "01"), row_of("XLA auto", "01", family="delta")]
    new = [row_of("XLA auto", "02", device="cpu cpu x 2, 2 cores"), row_of("a", "02", device="cpu cpu x 2, 2 cores")]
    other = row_of("Pallas", "01", device="gpu NVIDIA H100 x 1, 26 cores")
    assert latest([*old, other, row_of("XLA auto", "03", bench="scan"), *new]) == [old[2], other, *new]
    unknown = row_of("XLA auto", "03")
    del unknown["copy_gb_s"]
    assert latest([unknown]) == []
    assert list(kernels_report.verdicts(latest([*old[:2], *new]))) == [
        "diagonal, 8x8192x4096: XLA auto reaches 24.6 % and 0.11 % of a copy's rate; 1.0 and 1.0 times as fast as a"
    ]
    assert kernels_report.devices_without([other]) == "**No TPU figure was taken.**\n"


@pytest.mark.parametrize("newer_first", [False, True])
def test_a_run_is_as_new_as_its_time(newer_first: bool, tmp_path: Path) -> None:
    """Wherever its lines stand."""
    more = {"versions": {"jax": "0", "python": "3"}, "product_gop_s": 1, "exponential_g_s": 1}
    more |= {"ratio": 1, "ratio_forward_backward": 1}
    old, new = (row_of("XLA auto", time, ms, **more) for time, ms in (("09", 4.0), ("10", 7.0)))
    assert latest([new, old] if newer_first else [old, new]) == [new]
    out = tmp_path / "cpu.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in ([new, old] if newer_first else [old, new])))
    bench.main(["kernels", "--report-only", "--out", str(out)])
    assert "| XLA auto | 7 | 14 |" in out.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="--report-only is for kernels, not for memory"):
        bench.main(["memory", "--report-only"])


def test_what_no_row_has_is_listed() -> None:
    missing = list(kernels_report.not_run([row_of("XLA auto", "01")]))
    assert len(missing) == sum(len(family.shapes) for family in FAMILIES) - 1
    assert "cpu cpu: delta, gated, 8x2048x32x256" in missing
    assert "cpu cpu: diagonal, 8x8192x4096" not in missing


def test_a_row_without_products_has_no_rate_of_them() -> None:
    cells = kernels_report.cells(row_of("XLA auto", "01", tflops=None, gb_per_s=[1.0, 2.0]))
    assert (cells["TFLOP/s"], cells["GB/s"], cells["floor of"]) == ("", "1 / 2", "copy")
    assert [kernels_report.percent(x) for x in (0.372, 0.246, 0.0023)] == ["37 %", "24.6 %", "0.23 %"]


def test_exponentials_are_no_floor() -> None:
    family = FAMILIES[-1]
    assert family.taken(family.shapes[0]) == 4096 * 4096 * 16
    assert FAMILIES[0].taken(MATRICES[0]) == 0
    machine, work = Rates(copy=10, product=100, exponential=2), Work(20, 0, 8)
    assert machine.floors(work) == {"copy": 2}
    assert machine.exponentials(work) == 4
    assert machine.share(work, 8) == 0.25


def test_rows_from_when_exponentials_were_a_floor_are_read(tmp_path: Path) -> None:
    """4 ms forward and 8 with gradients, a floor of 3 ms of exponentials and one of 1 and 4 ms of bytes."""
    shares = {"copy": [0.25, 0.5], "exponential": [0.75, 0.375]}
    row = row_of("XLA auto", "01", 4.0, shares=shares, floor_ms=3.0, floor_ms_forward_backward=4.0, ratio=4 / 3)
    expected = {"floor_ms": 1.0, "floor_ms_forward_backward": 4.0, "ratio": 4.0, "ratio_forward_backward": 2.0}
    found = kernels_report.two_floors(row)
    assert {name: found[name] for name in expected} == expected
    assert found["exponentials_ms"] == 3
    assert found["shares"] == {"copy": [0.25, 0.5]}
    assert kernels_report.two_floors(found) == found
    assert kernels_report.cells(found)["exponentials ms"] == "3"
    (told,) = kernels_report.verdicts([found])
    assert told.endswith("25.0 % and 50 % of a copy's rate, exponentials alone are 75 % of its forward time")


def test_the_committed_report_is_that_of_the_committed_rows(tmp_path: Path) -> None:
    """Where this fails, `python -m experiments.bench kernels --report-only --out experiments/results/kernels/cpu.jsonl`
    writes it anew. Rows of runs that it does not show are in a file of their own."""
    committed = Path(kernels_report.__file__).parents[1] / "results" / "kernels"
    for name in ("cpu.jsonl", "memory-cpu.jsonl"):
        (tmp_path / name).write_text((committed / name).read_text())
    kernels_report.write(tmp_path / "cpu.jsonl")
    text = (tmp_path / "cpu.md").read_text()
    assert text == (committed / "cpu.md").read_text()
    assert "| exponentials ms |" in text
    assert re.search(r"^- train GLA, .* kB a token .* MB, within ", text, re.MULTILINE)
    rows = [json.loads(line) for line in (committed / "cpu.jsonl").read_text().splitlines()]
    shown = {row["time"] for row in latest(rows)}
    assert {row["time"] for row in rows} == shown


def test_memory_of_the_newest_run_is_in_the_report(tmp_path: Path) -> None:
    assert kernels_report.memory_a_token(tmp_path / "none.jsonl") == ""
    run = lambda hour, slope: [
        {"time": f"2026-11-29T{hour}:00:00+0000", "device": "cpu", "commit": hour, "command": "c", "case": "memory x",
         "tokens": tokens, "peak_bytes": slope * tokens, "array_bytes_per_token": 8e3} for tokens in (1024, 2048)
    ]  # fmt: skip
    path = tmp_path / "memory-cpu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*run("10", 80_000), *run("09", 90_000)]))
    told = kernels_report.memory_a_token(path)
    assert "([rows](memory-cpu.jsonl); cpu; commit 10; `c`)" in told
    assert "- x: 80 kB a token (10.0 arrays) and 0 MB, within 0.0%" in told
    assert "90 kB" not in told


def test_rates_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_rates", lambda name: name)
    assert {str(measure.rates()), measure.rates("float32"), measure.rates(np.float32)} == {"float32"}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_shapes_are_known_before_inputs_are_made(family: kernels_cases.Family, kind: str) -> None:
    shape = kernels_cases.QUICK.get(family.name, SMALL)[-1]
    made = family.inputs(np.random.default_rng(0), shape)
    found = kernels_cases.structs(family, shape, kind)
    assert [x.shape for x in found] == [x.shape for x in made]
    own = kind if family.products else "complex64" if "complex" in family.name else "float32"
    assert [x.dtype for x in found] == [own] * len(found[:3]) + ["float32"] * len(found[3:])


def test_memory_a_token() -> None:
    row = lambda tokens, peak: {"case": "memory x", "tokens": tokens, "peak_bytes": peak, "array_bytes_per_token": 8e3}
    found = [row(tokens, 10_000_000 + 80_000 * tokens) for tokens in (1024, 2048, 4096)]
    assert list(memory.verdicts(found)) == ["memory x: 80 kB a token (10.0 arrays) and 10 MB, within 0.0%"]
    assert memory.cells({**found[0], "compile_seconds": 1.0})["kB a token"] == "90"


@pytest.mark.slow
def test_memory_is_compiled_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of families of every kind, and of a training step, whose tokens are those of all rows."""
    chosen = [family for family in FAMILIES if family.name in ("outer, a decay per head", "diagonal", "selective")]
    monkeypatch.setattr(memory, "FAMILIES", chosen)
    monkeypatch.setattr(training, "MODELS", ("Griffin",))
    rows = list(memory.rows(quick=True, seed=0))
    assert [row["case"].removeprefix("memory ") for row in rows[::2]] == [
        "outer, a decay per head, 2 heads of 32 x 32", "diagonal, width 32", "selective, width 32, state 4",
        "train Griffin, 4 layers of width 32, 2 rows",
    ]  # fmt: skip
    assert [row["tokens"] for row in rows] == [128, 256] * 4
    assert all(short["peak_bytes"] < long["peak_bytes"] for short, long in zip(rows[::2], rows[1::2], strict=True))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"no shape contains any of 7x7: there are outer, a decay per head 1x8192x96"):
        next(kernels.rows(quick=False, seed=0, shapes=("7x7",)))


@pytest.mark.parametrize("name", ["outer, a decay per head", "diagonal", "selective"])
def test_a_device_a_core_computes_the_same(name: str) -> None:
    """Heads or channels divided, what all share on every device; values and gradients."""
    (family,) = (family for family in FAMILIES if family.name == name)
    shape = kernels_cases.QUICK.get(name, (Shape(1, 80, jax.device_count(), 8),))[0]
    functions = kernels._functions(family, shape)
    arrays = tuple(jnp.asarray(x) for x in family.inputs(np.random.default_rng(0), shape))
    plain = f"XLA {family.methods[0]}"

    def both(name: str) -> Any:
        function: Any = functions[name]
        loss = lambda *x: sum(jnp.sum(jnp.sin(y)) for y in function(*x))
        return jax.jit(lambda *x: (function(*x), jax.grad(loss, tuple(range(len(x))))(*x)))(
            *kernels._placed(family, name, arrays)
        )

    chex.assert_trees_all_close(both(plain + kernels.PER_CORE), both(plain), rtol=1e-4, atol=1e-4)
