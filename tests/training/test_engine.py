from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.training import EngineConfig
from lungkit.training.engine import as_resource_error, start_engine


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
