"""Steps that are replayed train as steps that are not; on the CPU a stand-in replays, on a device a CUDA graph."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses import DeepSupervisionLoss, DiceCELoss
from lungkit.nn import AttentionUNet, UNet
from lungkit.nn.convolution import CHANNELS_LAST
from lungkit.training import EngineConfig, TrainConfig, Trainer, load_checkpoint
from lungkit.training.captured_step import REHEARSALS, CapturedStep, CudaRecorder
from lungkit.training.engine import start_engine, why_no_cuda_graph
from lungkit.training.run import Run

Tiny = Callable[..., TrainConfig]


class StandIn:
    """Records as a CUDA graph does: from then on the work reads and writes the memory that it had when recorded."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.rehearsed = self.recorded = self.replayed = self.released = 0

    def rehearse(self, work: Callable[[], Tensor]) -> Tensor:
        self.rehearsed += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> SimpleNamespace:
        self.recorded += 1
        with torch.random.fork_rng():
            result = work().clone()
        gradients = [parameter.grad for parameter in self.parameters]

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    gradient.copy_(parameter.grad)
                    parameter.grad = torch.full_like(gradient, torch.nan)

        def release() -> None:
            self.released += 1

        return SimpleNamespace(result=result, replay=replay, release=release)


class Unrecordable(StandIn):
    def record(self, work: Callable[[], Tensor]) -> SimpleNamespace:
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")


class Toy:
    """One weight w on batches x with labels y: the loss is the sum of w x - y, its gradient the sum of x."""

    def __init__(self, recorder: type[StandIn] = StandIn, *, insist: bool = False) -> None:
        self.weight = nn.Parameter(torch.ones(()))
        self.recorder = recorder([self.weight])
        self.step = CapturedStep(self.gradients, [self.weight], self.recorder, insist=insist)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        self.weight.grad = None
        loss = (self.weight * images - labels).sum()
        loss.backward()
        return loss.detach()

    def __call__(self, *values: float) -> tuple[float, float]:
        """Loss and gradient of a batch of these values with labels 1."""
        loss = self.step(torch.tensor(values), torch.ones(len(values), dtype=torch.uint8))
        return loss.item(), self.weight.grad.item()


def test_every_batch_has_its_own_loss_and_gradient():
    toy = Toy()
    assert [toy(n, 2 * n) for n in range(1, 8)] == [(3 * n - 2, 3 * n) for n in range(1, 8)]
    recorder = toy.recorder
    assert (recorder.rehearsed, recorder.recorded, recorder.replayed) == (REHEARSALS, 1, 7 - REHEARSALS)


def test_a_batch_of_another_shape_is_not_replayed(caplog):
    toy = Toy()
    with caplog.at_level(logging.INFO, "lungkit"):
        found = [toy(*[1.0] * count) for count in (2, 2, 2, 2, 3, 2, 3, 2)]
    assert [gradient for _, gradient in found] == [2, 2, 2, 2, 3, 2, 3, 2]
    assert toy.recorder.replayed == 3
    assert [record.message for record in caplog.records] == [
        "a batch of shape (3,) is not replayed: the recorded step is of (2,)"
    ]


def test_what_cannot_be_recorded_goes_on_as_it_is(caplog):
    toy = Toy(Unrecordable)
    assert [toy(float(n)) for n in range(8)] == [(n - 1, n) for n in range(8)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].message.endswith("(operation not permitted when stream is capturing)")


def test_who_insists_is_told_why_a_step_cannot_be_recorded():
    toy = Toy(Unrecordable, insist=True)
    for _ in range(REHEARSALS):
        toy(1.0)
    with pytest.raises(UsageError, match=r"engine\.cuda_graph is true, but .*not permitted when stream"):
        toy(1.0)


def test_memory_is_given_back_and_the_step_recorded_again():
    toy = Toy()
    for _ in range(REHEARSALS + 1):
        toy(1.0)
    toy.step.release()
    assert (toy.recorder.released, toy.weight.grad) == (1, None)
    assert toy(3.0) == (2, 3)
    assert (toy.recorder.rehearsed, toy.recorder.recorded) == (REHEARSALS, 2)


# ---- the option -------------------------------------------------------------------------------------------------


def test_a_cpu_has_no_graphs():
    with pytest.raises(UsageError, match=r"engine\.cuda_graph is true, but the device is cpu"):
        start_engine(EngineConfig(accelerator="cpu", precision="fp32", cuda_graph=True))


@pytest.mark.parametrize(
    ("engine", "processes", "reason"),
    [
        ({"precision": "bf16"}, 1, None),
        ({"precision": "fp32"}, 1, None),
        ({"precision": "fp16"}, 1, "engine.precision is 'fp16'"),
        ({"compile": True}, 1, "engine.compile"),
        ({}, 2, "2 processes"),
    ],
)
def test_what_keeps_a_step_from_being_a_graph(engine, processes, reason):
    fabric: Any = SimpleNamespace(device=torch.device("cuda:0"), world_size=processes)
    found = why_no_cuda_graph(EngineConfig(**engine), fabric)
    assert found is None if reason is None else found is not None and reason in found


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Runs replay their steps with stand-ins, which are listed here."""
    made: list[StandIn] = []

    class OfSession(CapturedStep):
        def __init__(self, step: Any, parameters: Any, recorder: Any, **options: Any) -> None:
            made.append(StandIn(parameters))
            super().__init__(step, parameters, made[-1], **options)

    monkeypatch.setattr("lungkit.training.session.cuda_recorder", lambda config, fabric: object())
    monkeypatch.setattr("lungkit.training.session.CapturedStep", OfSession)
    return made


def trained(config: TrainConfig) -> Path:
    return Trainer(config).fit().run_folder


def assert_same_state(first: Path, second: Path) -> None:
    """Weights, averages and the optimiser's moments are the same bits, the losses of all epochs the same numbers."""
    a, b = (load_checkpoint(folder / "checkpoints" / "last") for folder in (first, second))
    assert [name for name, value in a.weights.items() if not torch.equal(value, b.weights[name])] == []
    weights, others = a.trainer["network"], b.trainer["network"]
    assert [name for name, value in weights.items() if not torch.equal(value, others[name])] == []
    for key, moments in a.trainer["optimiser"]["state"].items():
        other = b.trainer["optimiser"]["state"][key]
        assert [name for name, value in moments.items() if not torch.equal(value, other[name])] == []
    losses = [[row["train_loss"] for row in run.trainer["position"]["rows"]] for run in (a, b)]
    assert losses[0] == losses[1]


SETTINGS: dict[str, dict[str, Any]] = {
    "gates, dropout": {"model__dropout": 0.3},
    "plain, deep supervision, momentum": {
        "model__name": "unet",
        "model__deep_supervision": True,
        "optimiser__name": "sgd",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_replayed_run_has_the_weights_of_one_that_is_not(name, tiny, request):
    config = tiny(report=False, **SETTINGS[name])
    plain = trained(config)
    recorders = request.getfixturevalue("recorders")
    assert_same_state(plain, trained(config))
    (recorder,) = recorders
    assert recorder.rehearsed + recorder.replayed == 12
    assert recorder.recorded == recorder.released == 5, (
        "once an epoch after the rehearsals; validation has the memory"
    )


def stopped_and_resumed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is stopped after five steps, in the middle of an epoch, and continued."""
    trainer = Trainer(config)
    with monkeypatch.context() as patched:
        look = Run._look_at_clock

        def stop_after_five(run: Run) -> None:
            look(run)
            if run.session.position.step == 5:
                trainer.stop()

        patched.setattr(Run, "_look_at_clock", stop_after_five)
        with pytest.raises(BaseException, match="stopped after step 5"):
            trainer.fit()
    (folder,) = (path for path in Path(config.runs).iterdir() if path.is_dir())
    return Trainer.from_run(folder).fit().run_folder


def test_a_replayed_run_that_is_resumed_has_the_weights_of_one_that_went_through(
    tiny, tmp_path, recorders, monkeypatch
):
    options = {"report": False, "model__dropout": 0.3}
    whole = trained(tiny(**options))
    resumed = stopped_and_resumed(tiny(**options, runs=str(tmp_path / "stopped")), monkeypatch)
    assert_same_state(whole, resumed)
    assert [recorder.rehearsed for recorder in recorders] == [REHEARSALS] * 3


# ---- on a device ------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    """cuDNN takes only algorithms that give the same bits again."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = (cudnn.deterministic, cudnn.benchmark), True
    yield
    cudnn.deterministic, cudnn.benchmark = before


def losses_and_weights(
    build: type[UNet], size: tuple[int, ...], *, deep: bool, half: bool, captured: bool
) -> list[Tensor]:
    """Losses of eight steps on the device with other batches each, then the weights."""
    network = build(len(size), 1, 2, features=(8, 16, 32), deep_supervision=deep, dropout=0.2, seed=0).cuda()
    network = network.to(memory_format=CHANNELS_LAST[len(size)])
    criterion: nn.Module = DiceCELoss(softmax=True)
    criterion = DeepSupervisionLoss(criterion) if deep else criterion
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def gradients(images: Tensor, labels: Tensor) -> Tensor:
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            outputs = network(images)
        loss = criterion(outputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        return loss.detach()

    step: Callable[[Tensor, Tensor], Tensor] = gradients
    if captured:
        step = CapturedStep(
            gradients, [*network.parameters()], CudaRecorder(torch.device("cuda")), insist=True
        )
    losses = []
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(2, 1, *size, generator=generator).cuda()
        images = images.contiguous(memory_format=CHANNELS_LAST[len(size)])
        labels = torch.randint(2, (2, *size), generator=generator, dtype=torch.uint8).cuda()
        torch.manual_seed(number)  # dropout
        losses.append(step(images, labels).clone())
        optimiser.step()
    return [*losses, *(parameter.detach() for parameter in network.parameters())]


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("build", "size", "deep", "half"),
    list(itertools.product([UNet, AttentionUNet], [(48, 64), (16, 24, 32)], [False, True], [False, True])),
)
def test_a_graph_trains_as_the_step_does(build, size, deep, half):
    expected, found = (
        losses_and_weights(build, size, deep=deep, half=half, captured=captured) for captured in (False, True)
    )
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


ON_DEVICE = {"report": False, "engine__accelerator": "cuda"}


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_a_graph_has_the_weights_of_one_without(name, precision, tiny, tmp_path):
    options = {**ON_DEVICE, **SETTINGS[name], "engine__precision": precision}
    runs = [
        trained(tiny(**options, engine__cuda_graph=graph, runs=str(tmp_path / str(graph))))
        for graph in (False, True)
    ]
    assert_same_state(*runs)


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic")
def test_a_run_with_a_graph_in_three_dimensions_has_the_weights_of_one_without(tiny, tmp_path, make_dataset):
    options = {
        **ON_DEVICE,
        "data__root": str(make_dataset(shape=(16, 32, 32))),
        "data__patch_size": (8, 16, 16),
        "engine__precision": "bf16",
    }
    runs = [
        trained(tiny(**options, engine__cuda_graph=graph, runs=str(tmp_path / str(graph))))
        for graph in (False, True)
    ]
    assert_same_state(*runs)


@pytest.mark.cuda
@pytest.mark.usefixtures("deterministic")
def test_a_run_with_a_graph_that_is_resumed_has_the_weights_of_one_that_went_through(
    tiny, tmp_path, monkeypatch
):
    options = {**ON_DEVICE, "engine__precision": "bf16", "engine__cuda_graph": True, "model__dropout": 0.3}
    whole = trained(tiny(**options))
    resumed = stopped_and_resumed(tiny(**options, runs=str(tmp_path / "stopped")), monkeypatch)
    assert_same_state(whole, resumed)


@pytest.mark.cuda
def test_memory_of_a_graph_is_given_back():
    network = UNet(2, 1, 2, features=(8, 16), seed=0).cuda()
    images = torch.randn(4, 1, 256, 256, device="cuda")
    labels = torch.zeros(4, 256, 256, dtype=torch.uint8, device="cuda")
    criterion = DiceCELoss(softmax=True)

    def gradients(images: Tensor, labels: Tensor) -> Tensor:
        network.zero_grad()
        loss = criterion(network(images), labels)
        loss.backward()
        return loss.detach()

    step = CapturedStep(gradients, [*network.parameters()], CudaRecorder(torch.device("cuda")), insist=True)
    for _ in range(REHEARSALS + 2):
        step(images, labels)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    step.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held / 2
