"""The phantom: tissues in their HU ranges, tumours of every kind and size, hard for shortcuts, same bits."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lungkit.data import open_dataset, read_case
from lungkit.data.phantom import TUMOUR_FRACTION, Phantom, TumourKind, make_phantom, write_phantom_dataset
from lungkit.data.phantom import dataset as phantom_dataset
from lungkit.data.phantom.grid import Grid, add_capsules, paint_ellipsoid, smooth_noise
from lungkit.data.phantom.patient import Patient
from lungkit.data.phantom.scanner import gaussian_blur
from lungkit.data.phantom.vessels import grow_vessels
from lungkit.errors import UsageError

SLICE = (1, 96, 96)
VOLUME = (16, 64, 64)


@pytest.fixture(scope="module")
def slices() -> list[Phantom]:
    return [make_phantom(seed, shape=(1, 128, 128)) for seed in range(60)]


@pytest.fixture(scope="module")
def volumes() -> list[Phantom]:
    return [make_phantom(seed, shape=(40, 72, 72)) for seed in range(4)]


def stacked(phantoms: list[Phantom]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, tumours and lungs of slices, (N, Y, X)."""
    return (
        np.stack([phantom.image[0] for phantom in phantoms]),
        np.stack([phantom.label[0] for phantom in phantoms]) > 0,
        np.stack([phantom.lungs[0] for phantom in phantoms]) > 0,
    )


def mean_dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    overlap = (predicted & truth).sum(axis=(1, 2))
    return float((2 * overlap / (predicted.sum(axis=(1, 2)) + truth.sum(axis=(1, 2)))).mean())


def best_band_dice(image: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """Best mean Dice of any mask "low < HU <= high" within a region, one band for all images."""
    edges = list(range(-900, 400, 50))
    bands = [(low, high) for low in edges for high in [*edges, 4000] if low < high]
    return max(mean_dice((image > low) & (image <= high) & region, truth) for low, high in bands)


def test_arrays_have_their_types_and_shapes(volumes: list[Phantom]) -> None:
    phantom = volumes[0]
    assert phantom.image.shape == phantom.label.shape == phantom.lungs.shape == (40, 72, 72)
    assert (phantom.image.dtype, phantom.label.dtype) == (np.int16, np.uint8)
    assert set(np.unique(phantom.label)) == {0, 1}


def test_lungs_are_aerated_and_hold_vessels(volumes: list[Phantom]) -> None:
    for phantom in volumes:
        lung = phantom.image[(phantom.lungs > 0) & (phantom.label == 0)]
        assert -900 < np.median(lung) < -760
        assert 0.03 < (lung > -500).mean() < 0.25


def test_lungs_fill_a_plausible_part_of_the_chest(volumes: list[Phantom]) -> None:
    for phantom in volumes:
        litres = phantom.lungs.sum() * np.prod(phantom.spacing_mm) / 1e6
        assert 2.0 < litres < 6.5


def test_air_surrounds_the_body(slices: list[Phantom]) -> None:
    for phantom in slices:
        assert abs(float(phantom.image[0, :3].mean()) + 1000) < 15


def test_body_holds_fat_soft_tissue_and_bone(volumes: list[Phantom]) -> None:
    for phantom in volumes:
        body = phantom.image[(phantom.image > -300) & (phantom.lungs == 0)]
        assert 0.08 < ((body > -150) & (body < -50)).mean() < 0.6
        assert 0.15 < ((body > 0) & (body < 220)).mean() < 0.8
        assert 0.02 < (body > 250).mean() < 0.15
        assert phantom.image.max() < 1500


@pytest.mark.parametrize("seed", range(6))
def test_heart_trachea_and_spine_are_in_their_places(seed: int) -> None:
    phantom = make_phantom(seed, shape=(48, 64, 64), kinds=())
    patient = Patient.draw(np.random.default_rng((seed, 0)))

    def at(z: float, y: float, x: float) -> int:
        voxel = np.round((np.array([z, y, x]) - phantom.origin_mm) / phantom.spacing_mm).astype(int)
        return int(phantom.image[tuple(voxel)])

    assert -30 < at(*patient.heart_centre) < 270
    assert at(80.0, 6.0, 0.0) < -600
    assert 0 < at(0.0, patient.spine_y, 0.0) < 600


def test_tumours_fill_the_promised_share(slices: list[Phantom], volumes: list[Phantom]) -> None:
    low, high = TUMOUR_FRACTION
    shares = [float(phantom.label.mean()) for phantom in slices + volumes]
    assert low <= min(shares)
    assert max(shares) <= high
    assert max(shares) > 8 * min(shares)


def test_tumours_lie_in_the_lungs(slices: list[Phantom], volumes: list[Phantom]) -> None:
    for phantom in slices + volumes:
        assert phantom.lungs[phantom.label > 0].mean() > 0.97


def test_every_kind_occurs(slices: list[Phantom]) -> None:
    kinds = [tumour.kind for phantom in slices for tumour in phantom.tumours]
    assert set(kinds) == set(TumourKind)
    assert {len(phantom.tumours) for phantom in slices} == {1, 2, 3}


@pytest.mark.parametrize("kind", list(TumourKind))
@pytest.mark.parametrize("shape", [SLICE, VOLUME])
def test_a_kind_can_be_asked_for(kind: TumourKind, shape: tuple[int, int, int]) -> None:
    phantom = make_phantom(5, shape=shape, kinds=[kind])
    assert [tumour.kind for tumour in phantom.tumours] == [kind]
    assert phantom.label.any()


def test_no_kinds_give_a_healthy_chest() -> None:
    phantom = make_phantom(5, shape=SLICE, kinds=())
    assert phantom.tumours == ()
    assert not phantom.label.any()


def test_healthy_and_ill_twins_differ_in_the_tumour_only() -> None:
    healthy = make_phantom(5, shape=SLICE, kinds=()).image.astype(int)
    ill = make_phantom(5, shape=SLICE, kinds=["solid"])
    changed = np.abs(ill.image - healthy) > 20
    assert changed[ill.label > 0].mean() > 0.8
    assert changed[ill.label == 0].mean() < 0.02


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (TumourKind.SOLID, 0, 130),
        (TumourKind.WALL_ATTACHED, 0, 130),
        (TumourKind.VESSEL_ATTACHED, 0, 130),
        (TumourKind.GROUND_GLASS, -680, -380),
    ],
)
def test_tumour_attenuation(kind: TumourKind, low: float, high: float) -> None:
    assert low < np.median(tumour_voxels(kind)) < high


def test_part_solid_tumours_have_two_parts() -> None:
    inside = tumour_voxels(TumourKind.PART_SOLID)
    assert 0.1 < (inside > -100).mean() < 0.5
    assert 0.3 < (inside < -300).mean() < 0.9


def tumour_voxels(kind: TumourKind) -> np.ndarray:
    """HU in the tumours of one kind, of several patients at 1 mm."""
    options = {"shape": (1, 128, 128), "spacing_mm": (2.0, 1.0, 1.0), "kinds": [kind]}
    phantoms = [make_phantom(seed, **options) for seed in range(8)]
    return np.concatenate([phantom.image[phantom.label > 0] for phantom in phantoms])


def test_wall_attached_tumours_touch_the_wall() -> None:
    def reaches_wall(phantom: Phantom) -> bool:
        label = phantom.label[0] > 0
        grown = label.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                grown |= np.roll(label, step, axis)
        return bool((grown & (phantom.lungs[0] == 0)).any())

    attached = [make_phantom(seed, shape=SLICE, kinds=[TumourKind.WALL_ATTACHED]) for seed in range(12)]
    free = [make_phantom(seed, shape=SLICE, kinds=[TumourKind.SOLID]) for seed in range(12)]
    assert sum(map(reaches_wall, attached)) >= 11
    assert sum(map(reaches_wall, free)) <= 4


def test_no_threshold_finds_the_tumours(slices: list[Phantom]) -> None:
    image, truth, _ = stacked(slices)
    assert best_band_dice(image, truth, np.ones_like(truth)) < 0.35


def test_no_threshold_within_the_lungs_finds_the_tumours(slices: list[Phantom]) -> None:
    image, truth, lungs = stacked(slices)
    assert 0.2 < best_band_dice(image, truth, lungs) < 0.5


def test_no_fixed_place_finds_the_tumours(slices: list[Phantom]) -> None:
    _, truth, _ = stacked(slices)
    prior = truth.mean(axis=0)
    levels = np.linspace(0, prior.max(), 20, endpoint=False)
    assert max(mean_dice(np.broadcast_to(prior > level, truth.shape), truth) for level in levels) < 0.2


@pytest.mark.parametrize("shape", [SLICE, VOLUME])
def test_same_seed_gives_the_same_bits_on_any_thread(shape: tuple[int, int, int]) -> None:
    alone = make_phantom(11, shape=shape)
    with ThreadPoolExecutor(4) as pool:
        for other in pool.map(lambda seed: make_phantom(seed, shape=shape), [11, 11, 11, 11]):
            np.testing.assert_array_equal(other.image, alone.image)
            np.testing.assert_array_equal(other.label, alone.label)


def test_seeds_give_different_patients() -> None:
    first, second = (make_phantom(seed, shape=SLICE).lungs for seed in (0, 1))
    assert (first != second).mean() > 0.01


def test_default_spacing_shows_the_whole_chest() -> None:
    phantom = make_phantom(0, shape=(60, 64, 64))
    assert phantom.spacing_mm == pytest.approx((4.0, 340 / 64, 340 / 64))
    assert not phantom.lungs[:, [0, -1]].any()
    assert not phantom.lungs[:, :, [0, -1]].any()


@pytest.mark.parametrize("shape", [(1, 64, 64), (12, 48, 48)])
def test_small_field_of_view_holds_lung_and_tumour(shape: tuple[int, int, int]) -> None:
    for seed in range(5):
        phantom = make_phantom(seed, shape=shape, spacing_mm=(2.0, 0.8, 0.8))
        assert phantom.spacing_mm == (2.0, 0.8, 0.8)
        assert phantom.lungs.mean() > 0.2
        assert phantom.label.any()


def test_affine_says_left_posterior_superior() -> None:
    phantom = make_phantom(0, shape=(4, 40, 48), spacing_mm=(3.0, 2.0, 1.0))
    assert nibabel.aff2axcodes(phantom.affine) == ("L", "P", "S")
    z, y, x = phantom.origin_mm
    np.testing.assert_allclose(phantom.affine @ [10, 5, 2, 1], [-(x + 10), -(y + 10), z + 6, 1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"shape": (128, 128)}, "shape"),
        ({"shape": (1, 8, 128)}, "shape"),
        ({"spacing_mm": (1.0, 1.0)}, "spacing_mm"),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "spacing_mm"),
        ({"kinds": ["benign"]}, "kinds.*ground-glass"),
    ],
)
def test_bad_argument_is_named(options: dict, named: str) -> None:
    arguments = {"seed": 0, "shape": SLICE, **options}
    with pytest.raises(UsageError, match=named):
        make_phantom(arguments.pop("seed"), **arguments)


def test_vessels_follow_murrays_law_within_the_lungs() -> None:
    patient = Patient.draw(np.random.default_rng(0))
    vessels = grow_vessels(patient, np.random.default_rng(1), min_radius_mm=0.8)
    assert vessels.radii.min() >= 0.8
    assert len(vessels.radii) > 500
    ends = vessels.ends
    assert patient.lungs(ends[:, 0], ends[:, 1], ends[:, 2]).max() < 0
    # No generation is wider, in cubes of radii, than the one it came from.
    flow = [float((vessels.radii[vessels.generations == g] ** 3).sum()) for g in range(8)]
    assert all(later <= earlier * 1.0001 for earlier, later in itertools.pairwise(flow))


def test_capsule_and_ellipsoid_have_their_volumes() -> None:
    grid = Grid((40, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    covered = np.zeros(grid.shape, np.float32)
    add_capsules(covered, grid, np.array([[0.0, -8, 0]]), np.array([[0.0, 8, 0]]), np.array([5.0]))
    assert covered.sum() == pytest.approx(np.pi * 25 * 16 + 4 / 3 * np.pi * 125, rel=0.02)
    ball = np.zeros(grid.shape, np.float32)
    paint_ellipsoid(ball, grid, (0.0, 0.0, 0.0), (8.0, 8.0, 8.0), 1.0)
    assert ball.sum() == pytest.approx(4 / 3 * np.pi * 512, rel=0.02)


def test_smooth_noise_has_unit_variance_and_its_scale() -> None:
    grid = Grid((24, 80, 80), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    noise = smooth_noise(np.random.default_rng(0), grid, 8.0)
    assert 0.85 < noise.std() < 1.15
    neighbours = np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]
    distant = np.corrcoef(noise[:, :, 20:].ravel(), noise[:, :, :-20].ravel())[0, 1]
    assert neighbours > 0.9
    assert abs(distant) < 0.1


def test_gaussian_blur_spreads_by_sigma() -> None:
    image = np.zeros((1, 41, 41), np.float32)
    image[0, 20, 20] = 1.0
    blurred = gaussian_blur(image, (0.5, 2.0, 3.0))
    offset = (np.arange(41) - 20.0) ** 2
    assert np.sqrt((blurred[0].sum(axis=1) * offset).sum()) == pytest.approx(2.0, rel=0.03)
    assert np.sqrt((blurred[0].sum(axis=0) * offset).sum()) == pytest.approx(3.0, rel=0.03)


def test_dataset_of_slices_is_read_back(tmp_path: Path) -> None:
    from lungkit.data import make_or_load_splits, open_dataset

    dataset = open_dataset(write_phantom_dataset(tmp_path / "set", cases=6, shape=(48, 64), dims=2, seed=3))
    assert (dataset.labels, dataset.layout) == ({"background": 0, "tumour": 1}, "nnunet")
    assert len(dataset.cases) == 6
    image = nibabel.load(dataset.cases[0].images[0])
    label = nibabel.load(dataset.cases[0].label)
    assert image.shape == label.shape == (64, 48, 1)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.header.get_zooms(), (340 / 48, 340 / 48, 5.0), rtol=1e-5)
    splits = make_or_load_splits(dataset)
    assert sorted(name for split in splits for name in split.val) == [case.case_id for case in dataset.cases]


def test_dataset_of_volumes_holds_the_phantoms(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path, cases=2, shape=(6, 40, 48), dims=3, seed=3)
    seed = int(np.random.SeedSequence(3).generate_state(2, np.uint32)[1])
    phantom = make_phantom(seed, shape=(6, 40, 48))
    stored = nibabel.load(root / "imagesTr" / "phantom_0001_0000.nii.gz")
    np.testing.assert_array_equal(np.asarray(stored.dataobj), phantom.image.transpose(2, 1, 0))
    np.testing.assert_allclose(stored.affine, phantom.affine, atol=1e-4)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_interrupted_dataset_is_completed_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cases": 4, "shape": (32, 32), "dims": 2}
    whole = files_of(write_phantom_dataset(tmp_path / "whole", **options))
    made: list[int] = []

    def failing(seed: int, **keywords) -> Phantom:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(seed)
        return make_phantom(seed, **keywords)

    monkeypatch.setattr(phantom_dataset, "make_phantom", failing)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_dataset(tmp_path / "part", **options)
    assert not (tmp_path / "part" / "dataset.json").exists()
    remade: list[int] = []
    monkeypatch.setattr(
        phantom_dataset, "make_phantom", lambda seed, **k: remade.append(seed) or make_phantom(seed, **k)
    )
    assert files_of(write_phantom_dataset(tmp_path / "part", **options)) == whole
    assert len(remade) == 2


def test_larger_dataset_begins_with_the_smaller(tmp_path: Path) -> None:
    small = files_of(write_phantom_dataset(tmp_path / "small", cases=2, shape=(32, 32), dims=2))
    large = files_of(write_phantom_dataset(tmp_path / "large", cases=3, shape=(32, 32), dims=2))
    scans = [name for name in small if name.endswith(".nii.gz")]
    assert len(scans) == 4
    assert all(large[name] == small[name] for name in scans)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_phantom_dataset(
        tmp_path, cases=2, shape=(32, 32), dims=2, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(1, 2), (2, 2)]


def test_dataset_says_it_is_synthetic(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path, cases=2, shape=(32, 32), dims=2)
    assert "synthetic" in json.loads((root / "dataset.json").read_text())["description"]


def test_organs_exclude_each_other_and_regions_hold_them(tmp_path: Path) -> None:
    shape = (1, 64, 64)
    for labels in ("organs", "regions"):
        write_phantom_dataset(tmp_path / labels, cases=3, shape=shape, dims=2, labels=labels)
    organs, regions = open_dataset(tmp_path / "organs"), open_dataset(tmp_path / "regions")
    assert organs.class_names == regions.class_names == ("background", "lung", "heart", "tumour")
    assert organs.regions == {} and regions.regions == {"lung": (1, 3), "heart": (2,), "tumour": (3,)}
    seen = set()
    for case in organs.cases:
        (image,), mask = read_case(case, organs.label_map)
        assert mask is not None
        seen |= set(np.unique(mask.array))
        if (mask.array == 2).any():
            assert np.median(image.array[mask.array == 2]) > 0 > np.median(image.array[mask.array == 1])
    assert seen == {0, 1, 2, 3}


def test_folder_with_other_phantoms_is_refused(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, cases=2, shape=(32, 32), dims=2)
    with pytest.raises(UsageError, match="holds phantoms made with other"):
        write_phantom_dataset(tmp_path, cases=2, shape=(32, 32), dims=2, seed=1)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write_phantom_dataset(tmp_path, cases=2, shape=(32, 32), dims=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cases": 1}, "cases"),
        ({"dims": 4}, "dims"),
        ({"shape": (64, 64), "dims": 3}, "shape"),
        ({"shape": (8, 64, 64), "dims": 2}, "shape"),
        ({"seed": -2}, "seed"),
        ({"labels": "ribs"}, "labels is 'ribs'"),
    ],
)
def test_bad_dataset_option_is_named(tmp_path: Path, options: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        write_phantom_dataset(tmp_path, **{"cases": 2, "shape": (32, 32), "dims": 2, **options})
