"""What is chosen on validation cases equals predicting and measuring with every option by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import save_model, threshold_network
from torch import Tensor, nn

from lungkit.data import ChannelNormalisation, Dataset, Preprocessing, Volume, make_phantom
from lungkit.inference import Postprocessing, Predictor, TrainedModel
from lungkit.pipeline.labelled import LabelledScans, measure_scans
from lungkit.training import Trainer, finishing, load_checkpoint, load_config
from lungkit.training import postprocessing_choice as module
from lungkit.training.postprocessing_choice import MARGIN, Choice, Trial, choose_postprocessing

# A normalised intensity is the logit of the foreground.
EIGHT_BIT = Preprocessing((ChannelNormalisation((-20, 20), 0.0, 1.0, "8-bit"),), {0: 0, 1: 1})
HU = Preprocessing((ChannelNormalisation((-1000, 400), -100.0, 200.0, "HU"),), {0: 0, 1: 1})
MEDIASTINUM = Preprocessing((ChannelNormalisation((-160, 240), 0.0, 1.0, "HU"),), {0: 0, 1: 1})
NAMES = ("background", "tumour", "node")


class FromImage(nn.Module):
    """Two classes: the intensity is the logit of the foreground. Three: it is the mean of two opposed ones."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes
        self.register_parameter("unused", nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1]
        return torch.cat([torch.zeros_like(x), x, x.flip(-1)][: self.classes], 1)


@dataclass(frozen=True)
class Case:
    """A scan and its mask as files would hold them: axes are (Z, Y, X) here and are turned there."""

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)

    def volume(self, array: np.ndarray) -> Volume:
        z, y, x = self.spacing_mm
        return Volume(array[:, ::-1, ::-1].transpose(2, 0, 1), np.array(
            [[-x, 0, 0, 0], [0, 0, -y, 0], [0, z, 0, 0], [0, 0, 0, 1.0]]
        ))  # fmt: skip


class Scans(LabelledScans):
    """Cases in memory."""

    def __init__(self, cases: Sequence[Case], classes: int) -> None:
        labels = {name: index for index, name in enumerate(NAMES[:classes])}
        dataset = Dataset(Path(), "memory", (), labels, ("CT",), 255, "folders")
        super().__init__(dataset, tuple(case.name for case in cases))
        object.__setattr__(self, "cases", {case.name: case for case in cases})

    def read(self, case_id: str) -> tuple[list[Volume], Volume]:
        case: Case = self.cases[case_id]  # type: ignore[attr-defined]
        return [case.volume(case.image.astype(np.float32))], case.volume(case.label.astype(np.uint8))


def case(
    name: str, logits: np.ndarray, label: np.ndarray, spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
) -> Case:
    return Case(name, logits, label, spacing_mm)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("model")
    return TrainedModel.load(save_model(folder / "m", threshold_network(dims=2), patch_size=(4, 4)))


@pytest.fixture
def choose(model: TrainedModel) -> Callable[..., Choice]:
    def choose(
        network: FromImage, cases: list[Case], preprocessing: Preprocessing = EIGHT_BIT, **options: Any
    ) -> Choice:
        predictor = predictor_of(model, network, preprocessing)
        return choose_postprocessing(predictor, Scans(cases, network.classes), **options)

    return choose


def predictor_of(
    model: TrainedModel, network: FromImage, preprocessing: Preprocessing, **options: Any
) -> Predictor:
    labels = {name: index for index, name in enumerate(NAMES[: network.classes])}
    own = replace(model, network=network, preprocessing=preprocessing, labels=labels)
    return Predictor([own], device="cpu", precision="fp32", **options)


def noisy_case(name: str, seed: int, *, classes: int = 2, ignored: bool = False) -> Case:
    """A square per class, its border uncertain, with a hole, and specks beside it."""
    random = np.random.default_rng(seed)
    shape = (4, 20, 24)
    label = np.zeros(shape, np.uint8)
    label[1:3, 4:14, 4:12] = 1
    if classes == 3:
        label[1:3, 4:14, 14:20] = 2
    logits = np.where(label == 1, 2.0, -2.5) + 1.3 * random.normal(size=shape)
    logits[1, 8:10, 7:9] = -4.0
    if ignored:
        label[:, 16:] = 255
    return case(name, logits, label)


@pytest.mark.parametrize("classes", [2, 3])
def test_every_lesion_f1_is_that_of_the_final_table_with_the_option(model, choose, classes):
    network = FromImage(classes)
    cases = [noisy_case(f"c{seed}", seed, classes=classes) for seed in range(2)]
    choice = choose(network, cases, by="lesion_f1")
    kept: dict[str, Any] = {}
    for number, trial in enumerate(choice.trials):
        tried = Postprocessing(**{**kept, trial.option: trial.value})
        table = measure_scans(
            predictor_of(model, network, EIGHT_BIT, postprocessing=tried), Scans(cases, classes)
        )
        assert trial.lesion_f1 == pytest.approx(table.mean("lesion_f1"), abs=1e-12)
        assert trial.dice == pytest.approx(table.mean("dice"), abs=1e-12)
        last = number + 1 == len(choice.trials) or choice.trials[number + 1].option != trial.option
        if last:
            kept |= {t.option: t.value for t in choice.trials if t.option == trial.option and t.kept}
    assert Postprocessing(**kept) == choice.options
    assert choice.lesion_f1 > choice.lesion_f1_without + MARGIN
    assert "mean lesion F1 from" in choice.note


def test_pieces_that_are_nowhere_sure_go_by_lesion_f1_though_dice_hardly_sees_them(choose):
    label = np.zeros((2, 32, 32), np.uint8)
    label[:, 2:26, 2:26] = 1
    logits = np.where(label == 1, 9.0, -9.0)
    logits[0, 29, 4], logits[1, 29, 20] = (math.log(0.65 / 0.35),) * 2  # two voxels of 1152
    cases = [case("a", logits, label)]
    assert choose(FromImage(), cases).options == Postprocessing()
    chosen = choose(FromImage(), cases, by="lesion_f1")
    assert chosen.lesion_f1_without == 0.5 and chosen.lesion_f1 == 1.0


def test_lesion_f1_is_not_bought_with_dice(choose):
    """Two pieces of a tumour go or stay together with its false ones: what is sure is a tenth of the truth."""
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 1:5, 1:5], label[:, 8:11, 8:11] = 1, 1
    logits = np.where(label == 1, math.log(0.58 / 0.42), -9.0)
    logits[:, 8:11, 8:11] = 9.0
    logits[0, 0, 8:12], logits[0, 11, 0:3] = (math.log(0.58 / 0.42),) * 2
    choice = choose(FromImage(), [case("a", logits, label)], by="lesion_f1")
    assert choice.dice >= choice.dice_without - MARGIN * len(choice.trials)
    assert choice.options.lesion_probability == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_every_dice_is_that_of_the_final_table_with_the_option(model, choose, classes):
    network = FromImage(classes)
    cases = [noisy_case(f"c{seed}", seed, classes=classes, ignored=seed == 1) for seed in range(3)]

    def mean_dice(options: Postprocessing) -> float:
        predictor = predictor_of(model, network, EIGHT_BIT, postprocessing=options)
        return measure_scans(predictor, Scans(cases, classes)).mean("dice")

    choice = choose(network, cases)
    kept: dict[str, Any] = {}
    for number, trial in enumerate(choice.trials):
        tried = Postprocessing(**{**kept, trial.option: trial.value})
        assert trial.dice == pytest.approx(mean_dice(tried), abs=1e-12)
        last = number + 1 == len(choice.trials) or choice.trials[number + 1].option != trial.option
        if last:
            kept |= {t.option: t.value for t in choice.trials if t.option == trial.option and t.kept}
    assert Postprocessing(**kept) == choice.options
    assert choice.dice == pytest.approx(mean_dice(choice.options), abs=1e-12)
    assert choice.dice_without == pytest.approx(mean_dice(Postprocessing()), abs=1e-12)
    assert choice.dice > choice.dice_without + MARGIN


def test_a_network_that_is_too_careful_gets_a_lower_threshold(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 3:9, 3:9] = 1
    logits = np.where(label == 1, math.log(0.35 / 0.65), -9.0)
    choice = choose(FromImage(), [case("a", logits, label)])
    assert choice.options == Postprocessing(threshold=0.3)
    assert (choice.dice_without, choice.dice) == (0.0, 1.0)
    # 0.2 finds as much: the value nearest to 1/2 is taken.
    assert [trial.value for trial in choice.trials if trial.kept] == [0.3]


def test_holes_are_filled_where_the_truth_has_none(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 3:9, 3:9] = 1
    logits = np.where(label == 1, 9.0, -9.0)
    logits[:, 5:7, 5:7] = -9.0
    assert choose(FromImage(), [case("a", logits, label)]).options == Postprocessing(fill_holes=True)


def test_specks_go_with_the_smallest_volume_that_removes_them(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 2:9, 2:9] = 1
    logits = np.where(label == 1, 9.0, -9.0)
    logits[0, 11, ::3] = 9.0
    # Of 8 mm^3 each.
    assert choose(FromImage(), [case("a", logits, label)]).options == Postprocessing(smallest_lesion_ml=0.01)


def beside_a_tumour(*, real: bool) -> Case:
    """A tumour of 1.536 ml and another piece of 0.144 ml as sure as it, real or not."""
    label = np.zeros((3, 16, 16), np.uint8)
    label[:, 1:9, 1:9] = 1
    logits = np.where(label == 1, 9.0, -9.0)
    logits[0, 11:14, 1:7] = 9.0
    label[0, 11:14, 1:7] = real
    return case(f"real {real}", logits, label)


def test_pieces_larger_than_a_small_tumour_elsewhere_go_by_their_share_of_the_one_beside_them(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 3:5, 3:6] = 1  # 0.096 ml
    small = case("small", np.where(label == 1, 9.0, -9.0), label)
    choice = choose(FromImage(), [beside_a_tumour(real=False), small])
    assert choice.options == Postprocessing(lesion_share=0.1)
    assert choice.dice == 1.0


def test_a_share_that_costs_as_many_true_lesions_as_false_ones_is_not_kept(choose):
    cases = [beside_a_tumour(real=True), beside_a_tumour(real=False)]
    assert choose(FromImage(), cases).options == Postprocessing()
    assert choose(FromImage(), [beside_a_tumour(real=True)]).options == Postprocessing()


def test_a_perfect_network_gets_nothing(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    label[:, 3:9, 3:9] = 1
    choice = choose(FromImage(), [case("a", np.where(label == 1, 9.0, -9.0), label)])
    assert choice.options == Postprocessing()
    assert choice.note == "No postprocessing raised the mean Dice by more than 0.002: none was used."
    assert not any(trial.kept for trial in choice.trials)


@pytest.mark.parametrize(("voxels", "kept"), [(1, False), (9, True)])
def test_an_option_has_to_pay_more_than_the_margin(choose, voxels, kept):
    label = np.zeros((4, 32, 32), np.uint8)
    label[:, :16, :16] = 1
    logits = np.where(label == 1, 9.0, -9.0)
    for index in range(voxels):
        logits[0, 20 + 4 * (index // 3), 4 * (index % 3)] = 9.0
    gain = voxels / (2 * 1024 + voxels)
    assert (gain > MARGIN) is kept
    assert (choose(FromImage(), [case("a", logits, label)]).options != Postprocessing()) is kept


def test_without_foreground_in_truth_nothing_is_chosen(choose):
    label = np.zeros((2, 12, 12), np.uint8)
    choice = choose(FromImage(), [case("a", np.full(label.shape, -9.0), label)])
    assert choice.options == Postprocessing() and math.isnan(choice.dice)
    assert json.loads(json.dumps(choice.to_dict(), allow_nan=False))["dice"] is None


def test_without_cases_nothing_is_chosen(choose):
    assert choose(FromImage(), []).options == Postprocessing()


@pytest.mark.parametrize(
    ("preprocessing", "tried"),
    [(HU, True), (EIGHT_BIT, False), (MEDIASTINUM, True)],
    ids=["lung window", "8-bit", "mediastinum"],
)
def test_lungs_are_looked_for_where_scans_are_in_hu(choose, preprocessing, tried):
    """They are found in the scan itself: the window that the network sees does not matter."""
    choice = choose(FromImage(), [noisy_case("a", 0)], preprocessing)
    assert ("inside_lungs" in {trial.option for trial in choice.trials}) is tried


def test_lesions_outside_the_lungs_are_removed_where_that_pays(model):
    phantom = make_phantom(3, shape=(24, 64, 64), kinds=("solid",))
    found = phantom.label.copy()
    found[:8, 1:9, 1:9] = 1

    class Marked(FromImage):
        """Finds the tumour and a large thing in the air before the chest; what it sees is the scan."""

        def forward(self, x: Tensor) -> Tensor:
            plane = next(self.planes)
            logit = torch.where(plane > 0, 9.0, -9.0)[None, None]
            return torch.cat([-logit, logit], 1)

    network = Marked()
    network.planes = iter(torch.from_numpy(found))
    scan = case("a", phantom.image, phantom.label, phantom.spacing_mm)
    predictor = predictor_of(model, network, HU, batch_size=1)  # slices come one after the other
    choice = choose_postprocessing(predictor, Scans([scan], 2))
    assert choice.options == Postprocessing(inside_lungs=True)
    assert choice.dice == 1.0


def test_postprocessing_that_the_predictor_has_is_left_out(model):
    predictor = predictor_of(
        model, FromImage(), EIGHT_BIT, postprocessing=Postprocessing(smallest_lesion_ml=1e3)
    )
    plain = predictor_of(model, FromImage(), EIGHT_BIT)
    scans = Scans([noisy_case("a", 0)], 2)
    assert choose_postprocessing(predictor, scans) == choose_postprocessing(plain, scans)


@pytest.mark.parametrize("by", ["dice", "lesion_f1"])
def test_cases_are_also_measured_with_what_other_patients_chose(model, choose, by):
    network = FromImage()
    cases = [noisy_case(f"p{number}_{part}", number) for number in range(7) for part in "ab"]
    whose = {case.name: case.name.split("_")[0] for case in cases}
    dice, lesion_f1 = [], []
    for group in range(5):
        of_group = [case for case in cases if int(whose[case.name][1:]) % 5 == group]
        others = [case for case in cases if case not in of_group]
        options = choose(network, others, by=by).options
        table = measure_scans(
            predictor_of(model, network, EIGHT_BIT, postprocessing=options), Scans(of_group, 2)
        )
        dice += [row.values["dice"] for row in table.rows]
        lesion_f1 += [row.values["lesion_f1"] for row in table.rows]
    choice = choose(network, cases, by=by, patients=whose)
    assert choice.held_out == pytest.approx((np.mean(dice), np.mean(lesion_f1)))
    assert choice.held_out != (choice.dice, choice.lesion_f1)
    honest = choice.held_out[0] if by == "dice" else choice.held_out[1]
    assert f"{honest:.4f}: expect that of new patients" in choice.note
    assert choice.to_dict()["dice_held_out"] == choice.held_out[0]


def test_the_cases_of_a_single_patient_are_measured_with_their_own_choice_alone(choose):
    choice = choose(FromImage(), [noisy_case("a", 0), noisy_case("b", 1)], patients={"a": "p", "b": "p"})
    assert math.isnan(choice.held_out[0]) and "other patients" not in choice.note
    assert choice.to_dict()["dice_held_out"] is None


def test_processes_share_the_cases_and_agree(choose, monkeypatch):
    network, cases = FromImage(), [noisy_case(f"c{seed}", seed) for seed in range(5)]
    alone = choose(network, cases)
    shares: list[Any] = []

    def collect(value, world_size):
        shares.append(value)
        raise StopIteration

    monkeypatch.setattr(module, "gather_objects", collect)
    for rank in range(2):
        with pytest.raises(StopIteration):
            choose(network, cases, rank=rank, world_size=2)
    assert [len(share) for share in shares] == [3, 2]
    monkeypatch.setattr(module, "gather_objects", lambda value, world_size: shares)
    assert choose(network, cases, rank=1, world_size=2) == alone


def test_it_can_be_given_up_after_a_case(choose):
    seen = []

    def stop():
        seen.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(FromImage(), [noisy_case("a", 0), noisy_case("b", 1)], after_case=stop)
    assert seen == [1]


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


@pytest.fixture
def chosen(monkeypatch):
    """What every run chooses, since two epochs of a tiny network make nothing worth choosing."""
    options = Postprocessing(threshold=0.999, smallest_lesion_ml=0.5)
    choice = Choice(options, 0.6, 0.5, (Trial("threshold", 0.999, 0.6, True),))
    monkeypatch.setattr(finishing, "choose_postprocessing", lambda *args, **keywords: choice)
    return choice


def test_a_run_keeps_its_choice_with_the_best_weights(tiny, no_pictures, chosen):
    run = Trainer(tiny(epochs=1, choose_postprocessing=True)).fit().run_folder
    assert TrainedModel.load(run).postprocessing == chosen.options
    assert (
        load_checkpoint(run / "checkpoints" / "best").description["postprocessing"]
        == chosen.options.to_dict()
    )
    written = json.loads((run / "postprocessing.json").read_text())
    assert written["postprocessing"] == chosen.options.to_dict()
    assert written["tried"] == [
        {"option": "threshold", "value": 0.999, "dice": 0.6, "kept": True, "lesion_f1": None}
    ]
    assert written["epoch"] == 1


def test_the_final_table_is_made_with_the_choice_and_says_so(tiny, no_pictures, chosen):
    plain = Trainer(tiny(epochs=1)).fit()
    result = Trainer(tiny(epochs=1, choose_postprocessing=True)).fit()
    assert not (plain.run_folder / "postprocessing.json").exists()
    assert plain.table.mean("sensitivity") > 0
    assert result.table.mean("sensitivity") == 0  # nothing is 0.999 foreground
    assert chosen.note in (result.run_folder / "validation.txt").read_text()
    assert "lesions below 0.5 ml removed" in chosen.note and "from 0.5000 to 0.6000" in chosen.note
    content = json.loads((result.run_folder / "validation.json").read_text())
    assert content["postprocessing"] == chosen.options.to_dict()


def test_a_run_that_is_over_can_choose_later(tiny, no_pictures, chosen):
    run = Trainer(tiny(epochs=1)).fit().run_folder
    assert TrainedModel.load(run).postprocessing == Postprocessing()
    config = load_config(run / "config.yaml")
    config.choose_postprocessing = True
    Trainer(config, resume=run).fit()
    assert TrainedModel.load(run).postprocessing == chosen.options


def test_a_real_choice_in_a_run_never_loses(tiny, no_pictures):
    result = Trainer(tiny(epochs=3, choose_postprocessing=True)).fit()
    written = json.loads((result.run_folder / "postprocessing.json").read_text())
    assert written["dice"] >= written["dice_without"]
    assert result.dice == pytest.approx(written["dice"], abs=1e-6)
    assert written["dice_without"] == pytest.approx(result.best_dice, abs=1e-6)
