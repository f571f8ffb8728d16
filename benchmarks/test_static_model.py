"""The cost model: loops are priced by their turns, budgets hold, and predictions carry the names of what is timed."""

from __future__ import annotations

from pathlib import Path

import cubins
import kernel_times
import pytest
import static_model
from cubins import Resources
from kernel_paths import Configuration, Launch
from kernel_prices import Prediction, price
from predicted_report import Budget, configuration_table, measured_rows
from sass import Function, Instruction, executions

RESOURCES = Resources(registers=32, static_shared=0, stack=0, local=0)
LOOP = "for (int k = 0"


def _function(folder: Path) -> Function:
    """A loop of two instructions between two others."""
    source = folder / "kernel.cu"
    source.write_text("load();\nfor (int k = 0; k < n; ++k) add();\nstore();\n")
    texts = [("LDG.E.128 R0, [R2.64]", 1), ("FADD R0, R0, R1", 2), ("@P0 BRA `(.L_x_0)", 2), ("EXIT", 3)]
    code = [Instruction(text, ((str(source), line),), 1 if "BRA" in text else None) for text, line in texts]
    return Function("kernelIfE", code, {0, 1, 2, 3})


def _prediction(
    folder: Path, turns: float, *, blocks: int = 264, moved: float = 1e6, waits: float = 0, loaded: float = 0
) -> Prediction:
    launch = Launch(
        "op", "kernelIfE", blocks, 128, 0, {LOOP: turns}, (), moved, 512, units=4 * blocks, waits=waits,
        loaded_bytes=loaded,
    )  # fmt: skip
    found = price(launch, _function(folder), RESOURCES)
    return Prediction(Configuration("op (1, 2)", 1e6, (launch,), "op forward 1x2"), (found,))


def test_a_loop_is_priced_by_its_turns(tmp_path: Path) -> None:
    assert _prediction(tmp_path, 5).prices[0].instructions == 1 + 5 * 2 + 1


def test_a_loop_without_declared_turns_is_an_error(tmp_path: Path) -> None:
    code = [Instruction("FADD R0, R0, R1", ()), Instruction("@P0 BRA `(.L_x_0)", (), 0)]
    with pytest.raises(ValueError, match="no declared number of turns"):
        executions(Function("kernel", code, {0, 1}), {LOOP: 5}, ())


def test_loops_of_one_line_have_turns_of_their_own_in_their_order(tmp_path: Path) -> None:
    function = _function(tmp_path)
    twice = Function(
        "kernel",
        function.code[:3] + [Instruction(i.text, i.places, 4 if i.target else None) for i in function.code],
        {*range(7)},
    )
    twice.code[3:4] = [Instruction("NOP", ())]
    assert executions(twice, {LOOP: (3, 7)}, ())[1:6] == [3, 3, 1, 7, 7]
    with pytest.raises(ValueError, match="more loops than the 1 declared"):
        executions(twice, {LOOP: (3,)}, ())


def test_a_path_that_loads_less_than_the_kernel_does_is_named(tmp_path: Path) -> None:
    of_all_threads = 264 * 128 * 16
    enough = [_prediction(tmp_path, 5, loaded=of_all_threads)]
    budgets = static_model.prices_by_kernel(enough)
    assert static_model.problems(enough, {}, budgets) == []
    (problem,) = static_model.problems([_prediction(tmp_path, 5, loaded=2 * of_all_threads)], {}, budgets)
    assert problem == "op (1, 2): 540672 bytes of loads in the code, 1081344 declared"


def test_accesses_of_global_memory_have_the_width_of_their_instruction(tmp_path: Path) -> None:
    assert _prediction(tmp_path, 5).prices[0].access_bytes == 16


def test_blocks_that_do_not_fill_every_multiprocessor_take_longer(tmp_path: Path) -> None:
    full, half = (_prediction(tmp_path, 5, blocks=blocks).prices[0] for blocks in (264, 198))
    assert (full.balance, half.balance) == (1, 0.75)


def test_a_small_kernel_takes_at_least_its_longest_way(tmp_path: Path) -> None:
    alone = _prediction(tmp_path, 5, blocks=1, moved=8, waits=3).prices[0]
    assert alone.limit == "latency"
    assert alone.seconds == alone.latency > 3 * 0.6e-6


def test_a_kernel_that_gets_dearer_breaks_its_budget(tmp_path: Path) -> None:
    budgets = static_model.prices_by_kernel([_prediction(tmp_path, 5)])
    assert static_model.problems([_prediction(tmp_path, 5)], {}, budgets) == []
    (problem,) = static_model.problems([_prediction(tmp_path, 6)], {}, budgets)
    assert "14 instructions for 32 voxels, the budget is 12" in problem


def test_a_kernel_that_spills_is_named_with_its_architecture() -> None:
    spilling = {("sm_75", "kernel"): Resources(registers=255, static_shared=0, stack=8, local=0)}
    assert static_model.problems([], spilling, {}) == ["kernel spills on sm_75: 8 bytes of stack"]


def test_every_fatbinary_of_a_library_is_found() -> None:
    parts = [cubins.FATBINARY + size.to_bytes(8, "little") + bytes(size) for size in (24, 8)]
    assert list(cubins.fatbinaries(b"ELF" + parts[0] + b"text" + parts[1])) == parts


def test_a_missed_budget_is_counted(tmp_path: Path) -> None:
    budget = Budget("us", "op", lambda prediction: prediction.issue, most=0)
    ((*_, verdict),) = budget.rows([_prediction(tmp_path, 5)])
    assert verdict == "missed by 1 of 1"


def test_what_was_measured_stands_beside_what_is_predicted(tmp_path: Path) -> None:
    rows = [
        {"name": "copy", "provider": "lungkit", "bytes": 10, "graph_seconds": 1e-6, "bytes_per_second": 1e7},
        {
            "name": "op forward 1x2",
            "provider": "lungkit",
            "bytes": 10,
            "graph_seconds": 2e-6,
            "bytes_per_second": 5e6,
        },
        {
            "name": "op both 1x2",
            "provider": "lungkit",
            "bytes": 30,
            "graph_seconds": 6e-6,
            "bytes_per_second": 5e6,
        },
    ]
    measured = measured_rows({"rows": rows})
    assert measured["op backward 1x2"] == pytest.approx((4e-6, 0.5))
    assert configuration_table([_prediction(tmp_path, 5)], measured).endswith("| 2.0 | 50 % |")


def test_predictions_carry_the_names_of_what_is_timed() -> None:
    timed = {m.name for m in kernel_times.measurements("cpu", smoke=False)}
    named = [c.timed_as for c in static_model.configurations() if c.timed_as is not None]
    forwards = {name for name in named if " forward " in name}
    backwards = {name for name in named if " backward " in name}
    assert len(forwards) == 15
    assert forwards <= timed
    assert {name.replace(" backward ", " both ") for name in backwards} <= timed
