"""A training step that is recorded once and replayed: on a GPU as one CUDA graph, not as hundreds of launches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.training.config import EngineConfig
from lungkit.training.engine import why_no_cuda_graph

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")

# Steps before the one that is recorded: libraries choose algorithms and set up their handles in them.
REHEARSALS = 3
# Replays cost the host next to nothing: without a bound it would run ahead, and hold the batches of all those steps.
_REPLAYS_AHEAD = 4

Step = Callable[[Tensor, Tensor], Tensor]


class Recording(Protocol):
    """Work on fixed memory that can be done again."""

    result: Tensor
    """What the work returned: the same memory in every replay."""

    def replay(self) -> None:
        """Do the work again, on what its inputs hold now."""

    def release(self) -> None:
        """Give the memory back; there is no replay after this."""


class Recorder(Protocol):
    """How work is recorded on a device."""

    def rehearse(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work under the conditions of a recording, without one."""

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Record the work without doing it; a ``RuntimeError`` where it cannot be recorded."""


class CudaRecording:
    """A CUDA graph and the memory of its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self.result = result
        self._graph = graph
        self._pending: deque[torch.cuda.Event] = deque()

    def replay(self) -> None:
        """Launch the graph on the current stream; waits where the host is too many replays ahead of the device."""
        if len(self._pending) == _REPLAYS_AHEAD:
            self._pending.popleft().synchronize()
        self._graph.replay()
        done = torch.cuda.Event()
        done.record()
        self._pending.append(done)

    def release(self) -> None:
        """Free the graph's memory once the device has done with it."""
        torch.cuda.synchronize()
        self._graph.reset()


class CudaRecorder:
    """Records CUDA graphs on a stream of its own.

    Work must neither wait for the device nor read host memory that changes, and keeps what it allocates. Random numbers
    of the default generator are those that the work would draw by itself after the same ``torch.manual_seed``.

    Example:
        Sums of two vectors, recorded once::

            a, b = torch.ones(8, device="cuda"), torch.ones(8, device="cuda")
            recorder = CudaRecorder(torch.device("cuda"))
            recorder.rehearse(lambda: a + b)
            recording = recorder.record(lambda: a + b)
            a.fill_(3.0)
            recording.replay()
            print(recording.result[0].item())  # 4.0
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work on the stream of the recordings: handles and workspaces of the libraries belong to a stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> CudaRecording:
        """Capture the work; the thread that draws batches may pin memory meanwhile, so only this thread is watched."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its own stream behind
        return CudaRecording(graph, result)


class CapturedStep:
    """``step`` on batches of one shape, recorded once: after that a batch is copied in and the recording replayed.

    The first calls do the step as it is, so nothing is computed that is not a step of the run. What cannot be recorded
    goes on as it is, as do batches of another shape than the first, each with one line in the log.

    Args:
        step: called as ``step(images, labels)``; leaves gradients in ``parameters`` and returns the loss, detached.
        parameters: all that receive gradients.
        recorder: of the device that they are on.
        insist: raise where the step cannot be recorded.

    Raises:
        UsageError: when called, with ``insist``: the step cannot be recorded.
    """

    def __init__(
        self, step: Step, parameters: Sequence[nn.Parameter], recorder: Recorder, *, insist: bool = False
    ) -> None:
        self._step, self._parameters, self._recorder, self._insist = step, parameters, recorder, insist
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []
        self._recording: Recording | None = None
        self._rehearsals = 0
        self._gave_up = False
        self._told_of_shape = False

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradients of a batch, in the parameters; returns its loss, whose memory the next call overwrites."""
        if self._inputs is None:
            self._inputs = torch.empty_like(images), torch.empty_like(labels)
        if self._gave_up or not self._fits(images, labels):
            return self._step(images, labels)
        if self._rehearsals < REHEARSALS:
            self._rehearsals += 1
            return self._recorder.rehearse(lambda: self._step(images, labels))
        for kept, given in zip(self._inputs, (images, labels), strict=True):
            kept.copy_(given)
        if self._recording is None:
            self._record()
            if self._recording is None:
                return self._step(images, labels)
        self._recording.replay()
        # A step that was not replayed has left gradients elsewhere.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._recording.result

    def release(self) -> None:
        """Give the recording's memory back for other work; the next call records again."""
        recording, self._recording = self._recording, None
        if recording is not None:
            self._forget_gradients()
            recording.release()

    def _fits(self, images: Tensor, labels: Tensor) -> bool:
        assert self._inputs is not None
        fits = all(
            kept.shape == given.shape and kept.dtype == given.dtype
            for kept, given in zip(self._inputs, (images, labels), strict=True)
        )
        if not fits and not self._told_of_shape:
            self._told_of_shape = True
            _LOG.info(
                "a batch of shape %s is not replayed: the recorded step is of %s",
                tuple(images.shape),
                tuple(self._inputs[0].shape),
            )
        return fits

    def _record(self) -> None:
        assert self._inputs is not None
        images, labels = self._inputs
        self._forget_gradients()  # the recording allocates its own; these would only take memory
        try:
            self._recording = self._recorder.record(lambda: self._step(images, labels))
        except RuntimeError as error:
            self._gave_up = True
            self._forget_gradients()
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if self._insist:
                raise UsageError(
                    f"engine.cuda_graph is true, but the step cannot be recorded: {reason}; leave the option out"
                ) from error
            _LOG.warning(
                "the training step cannot be a CUDA graph and is launched piece by piece (%s)", reason
            )
            return
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _forget_gradients(self) -> None:
        self._gradients = []
        for parameter in self._parameters:
            parameter.grad = None


def cuda_recorder(config: EngineConfig, fabric: Fabric) -> CudaRecorder | None:
    """Records training steps on the device of ``fabric``; None where they stay as they are."""
    if config.cuda_graph is False or why_no_cuda_graph(config, fabric) is not None:
        return None
    return CudaRecorder(fabric.device)
