"""The cost model: loops are priced by their turns, budgets hold, and predictions carry the names of what is timed."""

from __future__ import annotations

from pathlib import Path

import kernel_times
import pytest
import static_model
from kernel_paths import Configuration, Launch
from sass import Function, Instruction
from static_model import Prediction, Resources

RESOURCES = Resources(registers=32, static_shared=0, stack=0, local=0)


def _prediction(folder: Path, turns: float) -> Prediction:
    """A loop of two instructions between two others."""
    source = folder / "kernel.cu"
    source.write_text("load();\nfor (int k = 0; k < n; ++k) add();\nstore();\n")
    texts = [("LDG.E R0, [R2.64]", 1), ("FADD R0, R0, R1", 2), ("@P0 BRA `(.L_x_0)", 2), ("EXIT", 3)]
    code = [Instruction(text, ((str(source), line),), 1 if "BRA" in text else None) for text, line in texts]
    launch = Launch("op", "kernelIfE", 4, 128, 0, {"for (int k = 0": turns}, (), 1e6, 512, units=16)
    price = static_model.price(launch, Function("kernelIfE", code, {0, 1, 2, 3}), RESOURCES)
    return Prediction(Configuration("op (1, 2)", 1e6, (launch,)), (price,))


def test_a_loop_is_priced_by_its_turns(tmp_path: Path) -> None:
    assert _prediction(tmp_path, 5).prices[0].instructions == 1 + 5 * 2 + 1


def test_a_loop_without_declared_turns_is_an_error(tmp_path: Path) -> None:
    function = _prediction(tmp_path, 5)
    code = [Instruction("FADD R0, R0, R1", ()), Instruction("@P0 BRA `(.L_x_0)", (), 0)]
    with pytest.raises(ValueError, match="no declared number of turns"):
        static_model.price(function.prices[0].launch, Function("kernel", code, {0, 1}), RESOURCES)


def test_a_kernel_that_gets_dearer_breaks_its_budget(tmp_path: Path) -> None:
    budgets = static_model.prices_by_kernel([_prediction(tmp_path, 5)])
    assert static_model.problems([_prediction(tmp_path, 5)], {}, budgets) == []
    (problem,) = static_model.problems([_prediction(tmp_path, 6)], {}, budgets)
    assert "14 instructions for 32 voxels, the budget is 12" in problem


def test_a_kernel_that_spills_is_named() -> None:
    spilling = {"kernel": Resources(registers=255, static_shared=0, stack=8, local=0)}
    assert static_model.problems([], spilling, {}) == ["kernel spills: 8 bytes of stack"]


def test_predictions_carry_the_names_of_what_is_timed() -> None:
    timed = {m.name for m in kernel_times.measurements("cpu", smoke=False)}
    named = [c.timed_as for c in static_model.configurations() if c.timed_as is not None]
    forwards = [name for name in named if " forward " in name]
    assert forwards
    assert set(forwards) <= timed
    assert {name.replace(" forward ", " both ") for name in forwards} <= timed
