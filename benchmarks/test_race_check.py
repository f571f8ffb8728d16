"""The calls for a sanitizer: no op is left out, and all of them run."""

from __future__ import annotations

from typing import Any

import pytest
import race_check
from torch.utils._python_dispatch import TorchDispatchMode

import lungkit.ops.norm_act  # noqa: F401  # defines its ops; lungkit.ops imports the others
from lungkit.ops import _library


class Ops(TorchDispatchMode):
    """The names of lungkit's ops and of torch's that are called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_every_op_is_called_forward_and_backward_and_no_product_of_a_library() -> None:
    with Ops() as ops:
        for make in race_check.CALLS.values():
            calls = list(make(race_check.Inputs("cpu", smoke=True)))
            for _, call in calls[:: max(1, len(calls) // 25)]:
                call()
    assert {f"lungkit::{name}" for name in _library.defined_ops()} <= ops.seen
    assert not {name for name in ops.seen if name.endswith(("mm", "matmul", "linear", "convolution"))}


def test_a_report_names_the_calls_of_the_ops_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert race_check.main(["gate_tail", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("gate_psi and gate_scale") for line in lines[:-2])
    assert lines[-1] == f"{len(lines) - 2} calls made"


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        race_check.main(["gate"])
    assert "attention_gate" in capsys.readouterr().err
