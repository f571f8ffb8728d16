"""From logits and probabilities to classes, and masks after the network: against scipy and against counting by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungkit.errors import DataError, UsageError
from lungkit.inference.lesions import Lesions
from lungkit.inference.postprocessing import (
    Postprocessing,
    classes_from_logits,
    classes_from_probabilities,
    fill_holes,
    foreground_box,
    largest,
    postprocess,
    probability_steps,
)

MM = (1.0, 1.0, 1.0)
ALL_ON = Postprocessing(
    threshold=0.3,
    fill_holes=True,
    inside_lungs=True,
    lesion_probability=0.7,
    smallest_lesion_ml=0.05,
    lesion_share=0.3,
)


def blobs(
    seed: int, classes: int = 1, *, level: float = 0.12, shape: tuple[int, int, int] = (9, 24, 20)
) -> np.ndarray:
    """Smooth random shapes with holes and specks, of several classes; a lower level gives larger ones."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for index in range(1, classes + 1):
        label[ndimage.gaussian_filter(random.normal(size=shape), 1.0) > level] = index
    return label


@pytest.mark.parametrize("options", [Postprocessing(), ALL_ON])
def test_options_survive_their_dict(options):
    assert Postprocessing.from_dict(options.to_dict()) == options


def test_options_are_off_unless_asked_for():
    assert Postprocessing.from_dict({}) == Postprocessing()
    assert not Postprocessing(threshold=0.3).changes_masks
    assert Postprocessing().summary() == "none"


def test_the_summary_names_what_is_on():
    assert ALL_ON.summary() == (
        "threshold 0.3, holes filled, lesions outside the lungs removed, lesions nowhere at probability 0.7 removed, "
        "lesions below 0.05 ml removed, lesions below 0.3 of the largest removed"
    )
    assert Postprocessing(lesion_share=1.0).summary() == "lesions beside the largest removed"


@pytest.mark.parametrize(
    "content", [{"treshold": 0.4}, {"threshold": "high"}, {"fill_holes": 1}, [0.5], None]
)
def test_a_dict_that_is_not_understood_is_refused(content):
    with pytest.raises(DataError, match="postprocessing"):
        Postprocessing.from_dict(content)


@pytest.mark.parametrize(
    "option",
    [
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"threshold": float("nan")},
        {"threshold": True},
        {"smallest_lesion_ml": -0.1},
        {"lesion_probability": 1.0},
        {"lesion_probability": -0.1},
        {"lesion_share": -0.1},
        {"lesion_share": 1.01},
        {"lesion_share": float("nan")},
        {"lesion_share": True},
        {"smallest_lesion_ml": float("inf")},
        {"fill_holes": "yes"},
        {"inside_lungs": None},
    ],
)
def test_impossible_values_are_named(option):
    with pytest.raises(UsageError, match=next(iter(option))):
        Postprocessing(**option)


def test_switched_off_it_gives_an_equal_new_array():
    label = blobs(0)
    result = postprocess(label, MM, Postprocessing(threshold=0.9))
    assert np.array_equal(result, label) and not np.shares_memory(result, label)


def test_the_mask_given_is_not_changed():
    label = blobs(1)
    before = label.copy()
    result = postprocess(label, MM, Postprocessing(fill_holes=True, smallest_lesion_ml=0.05))
    assert np.array_equal(label, before) and not np.array_equal(result, before)


def test_an_empty_mask_stays_empty():
    label = np.zeros((3, 4, 5), np.uint8)
    given = {"hu": label.astype(np.int16), "sure": label > 0, "probability": label}
    assert not postprocess(label, MM, ALL_ON, **given).any()


@pytest.mark.parametrize("seed", range(5))
def test_holes_are_those_of_scipy_slice_by_slice(seed):
    label = blobs(seed, level=-0.05)
    expected = np.stack([ndimage.binary_fill_holes(plane) for plane in label])
    assert expected.sum() > label.sum()
    fill_holes(label)
    assert np.array_equal(label, expected)


def test_a_hole_that_is_open_to_the_next_slice_is_filled():
    label = np.zeros((3, 5, 5), np.uint8)
    label[1, 1:4, 1:4] = 1
    label[1, 2, 2] = 0
    assert postprocess(label, MM, Postprocessing(fill_holes=True))[1, 2, 2] == 1


def test_a_bay_at_the_edge_of_the_slice_is_no_hole():
    label = np.zeros((1, 4, 5), np.uint8)
    label[0, :, 1], label[0, :, 3], label[0, 0, 2] = 1, 1, 1
    assert np.array_equal(postprocess(label, MM, Postprocessing(fill_holes=True)), label)


def test_a_hole_is_filled_with_the_class_round_it_and_other_classes_in_it_stay():
    label = np.zeros((1, 7, 7), np.uint8)
    label[0, 1:6, 1:6] = 2
    label[0, 2:5, 2:5] = 0
    label[0, 3, 3] = 1
    result = postprocess(label, MM, Postprocessing(fill_holes=True))
    assert result[0, 3, 3] == 1
    assert np.count_nonzero(result == 2) == 24


def test_a_gap_between_two_classes_is_no_hole():
    label = np.zeros((1, 5, 5), np.uint8)
    label[0, 1:4, 1:4] = 1
    label[0, 1:4, 3] = 2
    label[0, 2, 2] = 0
    assert np.array_equal(postprocess(label, MM, Postprocessing(fill_holes=True)), label)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_small_lesions_are_those_of_scipy(seed, classes):
    label, spacing = blobs(seed, classes), (2.0, 0.8, 0.9)
    expected = label.copy()
    for index in range(1, classes + 1):
        pieces, count = ndimage.label(label == index, np.ones((3, 3, 3)))
        for number in range(1, count + 1):
            if np.count_nonzero(pieces == number) * np.prod(spacing) < 20:
                expected[pieces == number] = 0
    assert (expected != label).any()
    assert np.array_equal(postprocess(label, spacing, Postprocessing(smallest_lesion_ml=0.02)), expected)


def test_a_lesion_of_just_the_volume_stays():
    label = np.zeros((1, 5, 30), np.uint8)
    label[0, 2, :10], label[0, 2, 12:21] = 1, 1
    # 0.7 * 0.7 * 2.5 * 10 is not 12.25 in floating point.
    options = Postprocessing(smallest_lesion_ml=12.25e-3)
    assert postprocess(label, (2.5, 0.7, 0.7), options).sum() == 10


def test_lesions_of_different_classes_are_apart():
    label = np.zeros((1, 4, 12), np.uint8)
    label[0, 1, 1:9], label[0, 1, 9:11] = 1, 2
    result = postprocess(label, MM, Postprocessing(smallest_lesion_ml=0.005))
    assert np.count_nonzero(result == 1) == 8 and not (result == 2).any()


def test_voxels_that_share_a_corner_are_one_lesion():
    label = np.zeros((2, 2, 2), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    assert len(Lesions.find(label).sizes) == 2
    assert postprocess(label, MM, Postprocessing(smallest_lesion_ml=0.002)).sum() == 2


def in_lungs(*, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """A lesion from ``margin`` voxels beside the lungs outwards, and lungs."""
    lungs, label = np.zeros((8, 40, 40), bool), np.zeros((8, 40, 40), np.uint8)
    lungs[:, :, :16] = True
    label[2:5, 10:20, 16 + margin : 36] = 1
    return label, lungs


def test_a_lesion_far_from_the_lungs_is_removed_and_one_within_stays():
    label, lungs = in_lungs(margin=12)
    label[3, 20, 5] = 1
    result = postprocess(label, MM, Postprocessing(inside_lungs=True), lungs=lungs)
    assert np.argwhere(result).tolist() == [[3, 20, 5]]


@pytest.mark.parametrize("margin", [0, 2, 4])
def test_a_lesion_at_the_pleura_is_kept_whole(margin):
    label, lungs = in_lungs(margin=margin)
    assert np.array_equal(postprocess(label, MM, Postprocessing(inside_lungs=True), lungs=lungs), label)


def test_inside_lungs_finds_the_lungs_in_the_scan():
    from lungkit.data import make_phantom

    phantom = make_phantom(3, shape=(32, 64, 64), kinds=("solid",))
    label = phantom.label.copy()
    label[:, 2:4, 2:4] = 1  # in the air before the chest
    result = postprocess(label, phantom.spacing_mm, Postprocessing(inside_lungs=True), hu=phantom.image)
    assert np.array_equal(result, phantom.label)


def test_without_hu_inside_lungs_says_why_not():
    with pytest.raises(UsageError, match=r"inside_lungs needs the scan in HU.*8-bit"):
        postprocess(blobs(0), MM, Postprocessing(inside_lungs=True))


def test_where_there_are_no_lungs_nothing_is_removed(caplog):
    label = blobs(0)
    hu = np.full(label.shape, 40, np.int16)
    result = postprocess(label, MM, Postprocessing(inside_lungs=True), hu=hu)
    assert np.array_equal(result, label)
    assert "no lesion was removed" in caplog.text


@pytest.mark.parametrize(
    ("label", "arguments", "message"),
    [
        (np.zeros((2, 3), np.uint8), {}, r"label must be uint8 \(Z, Y, X\)"),
        (np.zeros((2, 3, 4), np.int64), {}, "got int64"),
        (np.zeros((2, 3, 4), np.uint8), {"hu": np.zeros((2, 3, 5))}, "hu has shape"),
        (np.zeros((2, 3, 4), np.uint8), {"lungs": np.zeros((1, 3, 4), bool)}, "lungs has shape"),
        (np.zeros((2, 3, 4), np.uint8), {"probability": np.zeros((2, 4, 3))}, "probability has shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(label, arguments, message):
    with pytest.raises(UsageError, match=message):
        postprocess(label, MM, Postprocessing(), **arguments)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, float("nan"), 1.0)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(UsageError, match="spacing_mm"):
        postprocess(blobs(0), spacing, Postprocessing())


def test_views_give_what_copies_give():
    label = blobs(2, 2)
    options = Postprocessing(fill_holes=True, smallest_lesion_ml=0.02)
    turned = np.asfortranarray(label)[::-1, :, ::-1]
    assert np.array_equal(postprocess(turned, MM, options)[::-1, :, ::-1], postprocess(label, MM, options))


def test_the_box_holds_all_foreground_and_no_more():
    label = np.zeros((6, 7, 8), np.uint8)
    label[2, 3, 4] = label[4, 1, 6] = 1
    assert foreground_box(label) == (slice(2, 5), slice(1, 4), slice(4, 7))
    assert foreground_box(np.zeros_like(label)) is None


def test_it_takes_some_bytes_a_voxel():
    label = np.zeros((64, 256, 256), np.uint8)
    label[0, 0, 0] = label[-1, -1, -1] = 1  # the box is the whole
    label[20:30, 60:90, 60:90] = 1
    tracemalloc.start()
    postprocess(label, MM, Postprocessing(fill_holes=True, smallest_lesion_ml=0.1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8.5 * label.size


def probabilities(seed: int, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(classes, 4, 6, 5, generator=generator)).softmax(0)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_is_argmax_and_the_lowest_of_a_tie(classes, dtype):
    # Few values, so that many voxels have ties.
    scores = torch.randint(0, 4, (classes, 3, 4, 5), generator=torch.Generator().manual_seed(classes)).to(
        dtype
    )
    found = largest(scores)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), torch.from_numpy(scores.float().numpy().argmax(0)))


def test_a_single_logit_is_foreground_above_zero():
    assert classes_from_logits(torch.tensor([[0.0, 0.1, -0.1]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_without_threshold_the_most_probable_class_wins(classes):
    p = probabilities(classes, classes)
    assert torch.equal(classes_from_probabilities(p), p.argmax(0).to(torch.uint8))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_a_threshold_is_for_all_foreground_together(classes, threshold):
    p = probabilities(classes, classes)
    found = classes_from_probabilities(p, threshold)
    is_foreground = p[1:].sum(0) >= threshold
    assert torch.equal(found > 0, is_foreground)
    assert torch.equal(found[is_foreground].long(), p[1:].argmax(0)[is_foreground] + 1)
    assert found.dtype == torch.uint8


def test_a_probability_at_the_threshold_is_foreground():
    assert classes_from_probabilities(torch.tensor([[0.75, 0.76], [0.25, 0.24]]), 0.25).tolist() == [1, 0]


def test_a_sigmoid_model_has_one_channel():
    p = torch.tensor([[0.5, 0.51, 0.3]])
    assert classes_from_probabilities(p).tolist() == [0, 1, 0]
    assert classes_from_probabilities(p, 0.3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("classes", [0, 257])
def test_a_number_of_classes_that_no_mask_holds_is_refused(classes):
    for function in (classes_from_logits, classes_from_probabilities):
        with pytest.raises(UsageError, match=f"{classes} classes"):
            function(torch.zeros(classes, 1, 1, 1))


def test_lesions_that_are_nowhere_sure_are_removed_whole():
    label = np.zeros((1, 4, 9), np.uint8)
    label[0, 1:3, 1:4], label[0, 1:3, 6:8] = 1, 2
    sure = np.zeros(label.shape, bool)
    sure[0, 1, 1] = True
    result = postprocess(label, MM, Postprocessing(lesion_probability=0.8), sure=sure)
    assert np.array_equal(result, np.where(label == 1, 1, 0))
    with pytest.raises(UsageError, match="pass sure"):
        postprocess(label, MM, Postprocessing(lesion_probability=0.8))


def pieces(*masses: tuple[int, float], probability: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Lesions in a row, each a (class, mass) of voxels of one probability; the label map and that of probability."""
    label = np.zeros((1, 2 * len(masses), 24), np.uint8)
    for row, (index, mass) in enumerate(masses):
        label[0, 2 * row, : round(mass / probability)] = index
    return label, np.where(label > 0, probability, 0.1)


def rows_left(share: float, *masses: tuple[int, float], **options) -> list[int]:
    label, probability = pieces(*masses)
    result = postprocess(label, MM, Postprocessing(lesion_share=share, **options), probability=probability)
    assert (result[result > 0] == label[result > 0]).all()
    rows = [row for row in range(len(masses)) if result[0, 2 * row].any()]
    assert all((result[0, 2 * row] == label[0, 2 * row]).all() for row in rows)
    return rows


@pytest.mark.parametrize(
    ("share", "rows"),
    [(0.0, [0, 1, 2, 3]), (0.05, [0, 1, 2, 3]), (0.2, [0, 1, 2]), (0.5, [0, 1]), (1.0, [1])],
)
def test_lesions_below_the_share_of_the_largest_go(share, rows):
    """Of masses 6, 10, 2 and 1: that of just the share stays."""
    assert rows_left(share, (1, 6), (1, 10), (1, 2), (1, 1)) == rows


def test_lesions_as_large_as_the_largest_stay_with_it():
    assert rows_left(1.0, (1, 4), (1, 3), (1, 4)) == [0, 2]


def test_each_class_has_its_own_largest_lesion():
    assert rows_left(0.5, (1, 10), (2, 1), (1, 2), (3, 3), (3, 1)) == [0, 1, 3]


def test_the_share_is_of_the_largest_that_the_other_rules_leave():
    label, probability = pieces((1, 10), (1, 2), (1, 1))
    lungs = np.zeros((1, 6, 24), bool)
    lungs[0, 4:, :3] = True
    spacing = (1.0, 4.0, 1.0)  # the first row is 16 mm away
    options = Postprocessing(lesion_share=0.5, inside_lungs=True)
    result = postprocess(label, spacing, options, lungs=lungs, probability=probability)
    assert [bool(row.any()) for row in result[0, ::2]] == [False, False, True]


def test_the_mass_and_not_the_volume_says_which_lesion_is_the_largest():
    label, probability = pieces((1, 2), (1, 4))
    probability[0, 0, :4] = 0.95  # 3.8 in 4 voxels beside 4 in 8, then 0.4 in 8
    probability[0, 2, :8] = 0.05
    options = Postprocessing(lesion_share=1.0)
    result = postprocess(label, MM, options, probability=probability)
    assert result[0, 0].any() and not result[0, 2].any()


def test_without_probability_the_share_says_what_is_missing():
    with pytest.raises(UsageError, match=r"lesion_share needs the probability.*pass probability"):
        postprocess(blobs(0), MM, Postprocessing(lesion_share=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_probability_is_reached_where_the_probability_is(dtype):
    """Also at each step and one representable number below it."""
    exact = torch.tensor([step / 200 for step in range(201)], dtype=dtype)
    below = torch.nextafter(exact, torch.tensor(-1.0, dtype=dtype))
    assert probability_steps(exact).tolist() == list(range(201))
    assert probability_steps(below).tolist() == [0, *range(200)]
    assert probability_steps(exact).dtype == torch.uint8
