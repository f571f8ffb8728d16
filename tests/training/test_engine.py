from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.training import EngineConfig, Trainer, load_config
from lungkit.training.engine import as_resource_error, resolve_engine, start_engine


def test_an_accelerator_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match=r"engine\.accelerator 'abacus'"):
        start_engine(EngineConfig(accelerator="abacus"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_an_absent_device_is_named():
    with pytest.raises(UsageError, match=r"engine\.accelerator 'cuda'"):
        start_engine(EngineConfig(accelerator="cuda"))


def test_half_precision_on_the_cpu_is_refused():
    with pytest.raises(UsageError, match=r"engine\.precision is 'fp16'.*'bf16' or 'fp32'"):
        start_engine(EngineConfig(accelerator="cpu", precision="fp16"))


def test_an_error_about_something_else_is_left_alone():
    assert as_resource_error(RuntimeError("shapes do not match")) is None


def test_a_gpu_without_memory_says_what_helps():
    assert "smaller batch_size" in str(as_resource_error(torch.OutOfMemoryError("CUDA out of memory")))


@pytest.mark.parametrize(("computes_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_the_cpu_is_bf16_where_it_is_computed_in_hardware(
    monkeypatch, computes_bf16, precision
):
    monkeypatch.setattr("lungkit.inference.precision.cpu_computes_bf16", lambda: computes_bf16)
    found = resolve_engine(EngineConfig(accelerator="cpu"))
    assert (found.precision, found.channels_last) == (precision, True)


def test_a_precision_and_a_memory_format_that_were_asked_for_are_kept():
    asked = EngineConfig(accelerator="cpu", precision="bf16", channels_last=False)
    assert resolve_engine(asked) == asked


def test_the_run_writes_down_the_precision_that_auto_became(tiny):
    folder = Trainer(tiny(epochs=1, engine__precision="auto")).fit().run_folder
    assert load_config(folder / "config.yaml").engine.precision in ("bf16", "fp32")
