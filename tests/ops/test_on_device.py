"""What only a CUDA device can show: graphs, streams, threads, number formats, whole networks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lungkit.losses import DiceCELoss
from lungkit.nn import AttentionUNet, UNet
from lungkit.ops.attention_gate import attention_gate
from lungkit.ops.attention_gate import reference as reference_gate
from lungkit.ops.confusion_counts import confusion_counts
from lungkit.ops.dice_ce import dice_ce_loss
from lungkit.ops.dice_ce import reference as reference_loss
from lungkit.ops.gate_tail import gate_psi, gate_scale
from lungkit.ops.norm_act import norm_act

pytestmark = pytest.mark.cuda

Call = Callable[[], Sequence[Tensor]]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = False) -> Tensor:
    drawn = torch.randn(shape, device="cuda", dtype=dtype)
    if channels_last:
        drawn = drawn.contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        )
    return drawn


def gate_call(channels: int, dtype: torch.dtype = torch.bfloat16, *, channels_last: bool = False) -> Call:
    """Forward and backward of a gate on inputs of its own."""
    inner = channels // 2
    features = [
        draw(2, channels, 12, 20, 24, dtype=dtype, channels_last=channels_last),
        draw(2, inner, 6, 10, 12, dtype=dtype, channels_last=channels_last),
    ]
    weights = [
        draw(inner, channels, dtype=torch.float32) / 8,
        draw(inner, dtype=torch.float32),
        draw(1, dtype=torch.float32),
    ]
    inputs = [value.requires_grad_() for value in (*features, *weights)]

    def call() -> Sequence[Tensor]:
        out, alpha = attention_gate(*inputs)
        return (out, alpha, *torch.autograd.grad(out.sum() + alpha.sum(), inputs))

    return call


def loss_call(classes: int = 2) -> Call:
    logits = draw(2, classes, 24, 24, 24, dtype=torch.float32).requires_grad_()
    labels = torch.randint(classes, (2, 24, 24, 24), device="cuda", dtype=torch.uint8)

    def call() -> Sequence[Tensor]:
        loss = dice_ce_loss(logits, labels)
        return (loss, *torch.autograd.grad(loss, logits))

    return call


def norm_call(*, channels_last: bool = False) -> Call:
    x = draw(2, 32, 12, 20, 24, channels_last=channels_last).requires_grad_()
    weight, bias = (draw(32, dtype=torch.float32).requires_grad_() for _ in range(2))

    def call() -> Sequence[Tensor]:
        y = norm_act(x, weight, bias, slope=0.01)
        return (y, *torch.autograd.grad(y.square().sum(), [x, weight, bias]))

    return call


def tail_call() -> Call:
    a, b, weight = draw(2, 128, 6, 6, 6), draw(2, 128, 6, 6, 6), draw(128)
    return lambda: (gate_psi(a, b, weight)[0], gate_scale(a, torch.sigmoid(b[:, :1])))


def counts_call() -> Call:
    masks = [torch.randint(4, (2, 30, 31, 33), device="cuda", dtype=torch.uint8) for _ in range(2)]
    return lambda: confusion_counts(masks[0], masks[1], num_classes=4)


CALLS: dict[str, Callable[[], Call]] = {
    "gate 64": lambda: gate_call(64),
    "gate 32": lambda: gate_call(32),
    "gate 256": lambda: gate_call(256),
    "gate 32 fp32": lambda: gate_call(32, torch.float32),
    "gate 32 channels-last": lambda: gate_call(32, channels_last=True),
    "loss": loss_call,
    "norm": norm_call,
    "norm channels-last": lambda: norm_call(channels_last=True),
    "gate tail": tail_call,
    "counts": counts_call,
}


def detached(call: Call) -> list[Tensor]:
    """Its results without their graphs, whose leaves would hold on to the stream of this call."""
    return [result.detach() for result in call()]


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_bits_again(name):
    call = CALLS[name]()
    first = detached(call)
    for _ in range(20):
        assert_same_bits(call(), first)


@pytest.mark.parametrize("name", CALLS)
def test_a_side_stream_waits_for_nothing_else(name):
    call = CALLS[name]()
    expected = detached(call)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = call()
    stream.synchronize()
    assert_same_bits(found, expected)


def test_all_ops_in_one_graph_each_replayed():
    calls = [make() for make in CALLS.values()]
    expected = [detached(call) for call in calls]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [detached(call) for call in calls]
    for _ in range(3):
        for results in captured:
            for result in results:
                result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for found, wanted in zip(captured, expected, strict=True):
            assert_same_bits(found, wanted)


def test_two_threads_call_gates_of_different_widths():
    calls = [gate_call(64), gate_call(32), gate_call(64, torch.float32), loss_call()]
    expected = [detached(call) for call in calls]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                found = calls[number]()
                stream.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                    failures.append(f"call {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("classes", [200, 307, 614, 1228])
def test_the_loss_takes_classes_up_to_the_shared_memory_of_a_block(classes):
    logits = draw(1, classes, 8, 9, dtype=torch.float32).requires_grad_()
    labels = torch.randint(classes, (1, 8, 9), device="cuda")
    found, expected = (
        (loss, *torch.autograd.grad(loss, logits))
        for loss in (f(logits, labels) for f in (dice_ce_loss, reference_loss))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_newer_setting_of_tf32_is_asked_first():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    call = gate_call(32, torch.float32)
    exact = call()
    try:
        matmul.fp32_precision = "tf32"
        rounded = call()
    finally:
        matmul.fp32_precision = before
    assert not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 33, 47), (1, 32, 7, 19, 23), (1, 128, 5, 6, 7)], ids=str)
def test_a_gate_of_odd_sizes_is_near_the_plain_one(shape, dtype, channels_last):
    channels, inner = shape[1], shape[1] // 2
    coarse = (shape[0], inner, *((size + 1) // 2 for size in shape[2:]))
    x, phi = (draw(*size, dtype=dtype, channels_last=channels_last) for size in (shape, coarse))
    weights = [
        draw(inner, channels, dtype=torch.float32) / 8,
        draw(inner, dtype=torch.float32) / 4,
        draw(1, dtype=torch.float32),
    ]
    inputs = [value.requires_grad_() for value in (x, phi, *weights)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = (
        (out, alpha, *torch.autograd.grad(out.square().sum() + alpha.sum(), leaves))
        for leaves, gate in ((inputs, attention_gate), (exact, reference_gate))
        for out, alpha in [gate(*leaves)]
    )
    # Of the sums of sizes: where q is next to 0 its rounding decides whether a gradient passes at all.
    limit = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert float((a.detach().double() - b.detach()).abs().sum() / b.detach().abs().sum()) < limit


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("network", [UNet, AttentionUNet])
@pytest.mark.parametrize("size", [(64, 48), (16, 32, 32)], ids=str)
def test_a_network_trains_as_on_the_cpu(network, size, channels_last):
    net = network(len(size), 1, 2, features=(16, 32, 64), seed=0)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, *size, generator=generator)
    labels = torch.randint(2, (2, 1, *size), generator=generator, dtype=torch.uint8)
    loss_of = DiceCELoss(softmax=True, to_onehot_y=True)

    def gradients(device: str) -> list[Tensor]:
        placed = net.to(device)
        x = image.to(device)
        if channels_last and device == "cuda":
            order = torch.channels_last if len(size) == 2 else torch.channels_last_3d
            placed, x = placed.to(memory_format=order), x.contiguous(memory_format=order)
        loss = loss_of(placed(x), labels.to(device))
        found = torch.autograd.grad(loss, list(placed.parameters()))
        return [loss.detach().cpu(), *(value.cpu() for value in found)]

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for a, b in zip(gradients("cuda"), gradients("cpu"), strict=True):
            # One voxel whose activation is next to 0 may turn: seen on the CPU alone to be 2e-3 of a gradient.
            assert float((a - b).norm()) <= 1e-2 * float(b.norm()) + 1e-5
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
