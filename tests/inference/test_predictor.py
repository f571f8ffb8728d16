"""Predicting whole scans: geometry, ensembles, memory, and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from model_cases import HU, random_network, save_model, threshold_network
from torch import nn

import lungkit
from lungkit.data import ChannelNormalisation, Volume, preprocess_image, read_volume, write_nifti
from lungkit.errors import DataError, ResourceError, UsageError
from lungkit.inference import Postprocessing, Predictor, TrainedModel, predict_label

AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0, -40], [0, 0, 2.5, 12], [0, 0, 0, 1.0]])


def scan(shape=(30, 26, 12), seed=0, affine=AFFINE) -> Volume:
    """Smooth structures of -1000 to 1000 HU."""
    coarse = torch.randn(1, 1, *(-(-n // 4) for n in shape), generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0, 0]
    return Volume((smooth * 500).clamp(-1000, 1000).short().numpy(), affine)


@pytest.fixture
def random_model(tmp_path):
    return TrainedModel.load(save_model(tmp_path / "random", random_network()))


def exact(*models, **options) -> Predictor:
    return Predictor(models, device="cpu", precision="fp32", **options)


def test_a_pointwise_network_gives_the_threshold_of_every_voxel(tmp_path):
    volume = scan()
    predictor = lungkit.Predictor.from_run(
        save_model(tmp_path / "m", threshold_network(0.1)), precision="fp32"
    )
    prediction = predictor(volume)
    assert prediction.mask.dtype == np.uint8 and prediction.mask.shape == volume.array.shape
    assert (prediction.mask == (volume.array > 100)).all() and prediction.mask.any()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mask_is_that_of_the_whole_image_at_once(tmp_path, dims):
    network = random_network(dims=dims)
    patch = (16, 16) if dims == 2 else (8, 16, 16)
    model = TrainedModel.load(save_model(tmp_path / "m", network, patch_size=patch))
    volume = scan()
    image = torch.from_numpy(preprocess_image(volume, HU).array)
    whole = predict_label(network, image, patch if dims == 3 else (26, 30)).numpy()
    found = exact(model)(volume).mask
    assert (found.transpose(2, 1, 0)[:, :, ::-1] == whole).all() and found.any() and not found.all()


def test_context_slices_reach_the_network(tmp_path):
    network = random_network(dims=2, channels=3)
    model = TrainedModel.load(save_model(tmp_path / "m", network, patch_size=(16, 16), context_slices=1))
    volume = scan()
    image = torch.from_numpy(preprocess_image(volume, HU).array)
    whole = predict_label(network, image, (26, 30), context_slices=1).numpy()
    assert (exact(model)(volume).mask.transpose(2, 1, 0)[:, :, ::-1] == whole).all()


def test_all_48_orientations_give_the_same_mask_in_the_world(random_model):
    volume = scan()
    predictor = exact(random_model)
    expected = predictor(volume).mask
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product([1, -1], repeat=3):
            turned = nibabel.orientations.apply_orientation(
                volume.array.transpose(axes), [[i, flip] for i, flip in enumerate(flips)]
            )
            into = nibabel.orientations.inv_ornt_aff(
                [[i, flip] for i, flip in enumerate(flips)], turned.shape
            )
            affine = volume.affine[:, [*axes, 3]] @ into
            mask = predictor(Volume(np.ascontiguousarray(turned), affine)).mask
            back = mask[tuple(slice(None, None, flip) for flip in flips)].transpose(np.argsort(axes))
            assert (back == expected).all(), (axes, flips)


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_the_written_mask_overlays_the_scan_in_nibabel_and_simpleitk(tmp_path, random_model, angle):
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = scan(affine=turn @ AFFINE)
    write_nifti(tmp_path / "scan.nii.gz", volume.array, volume.affine)
    exact(random_model)(tmp_path / "scan.nii.gz").save(tmp_path / "mask.nii.gz")
    images = [nibabel.load(tmp_path / name) for name in ("scan.nii.gz", "mask.nii.gz")]
    np.testing.assert_allclose(images[1].affine, images[0].affine, atol=1e-4)
    assert images[1].shape == images[0].shape and images[1].get_data_dtype() == np.uint8
    first, second = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "mask.nii.gz"))
    assert first.GetSize() == second.GetSize()
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(second, get)(), getattr(first, get)(), atol=1e-4)


def test_the_same_anatomy_at_another_spacing_gives_the_same_mask_to_a_voxel(tmp_path):
    plan = replace(HU, target_spacing_mm=(2.0, 2.0, 2.0))
    predictor = exact(TrainedModel.load(save_model(tmp_path / "m", threshold_network(), preprocessing=plan)))
    balls = []
    for spacing in ((0.7, 0.7, 2.5), (1.3, 1.3, 1.0)):
        sizes = [round(60 / step) for step in spacing]
        grid = np.meshgrid(*((np.arange(n) + 0.5) * s - 30 for n, s in zip(sizes, spacing, strict=True)),
                           indexing="ij")  # fmt: skip
        distance = np.sqrt(sum(axis**2 for axis in grid))
        volume = Volume((np.clip(15 - distance, -5, 5) * 100).astype(np.int16), np.diag([*spacing, 1.0]))
        mask = predictor(volume).mask
        assert ((mask != 0) == (distance < 15))[np.abs(distance - 15) > 1.5].all()
        balls.append(mask.sum() * np.prod(spacing))
    assert balls[0] == pytest.approx(balls[1], rel=0.03)


def test_the_batch_size_does_not_change_the_mask(random_model):
    masks = [exact(random_model, batch_size=size)(scan()).mask for size in (1, 2, 7)]
    assert (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()


def test_mask_values_are_those_of_the_training_masks(tmp_path):
    folder = save_model(tmp_path / "m", threshold_network(), label_values={"background": 0, "tumour": 7})
    prediction = Predictor.from_run(folder, precision="fp32")(scan())
    assert np.unique(prediction.mask).tolist() == [0, 7] and prediction.labels["tumour"] == 7


def test_an_ensemble_is_the_mean_of_the_probabilities_over_different_grids(tmp_path):
    paths = [
        save_model(tmp_path / "a", random_network(seed=1)),
        save_model(tmp_path / "b", random_network(seed=2, dims=2), patch_size=(16, 16),
                   preprocessing=replace(HU, target_spacing_mm=(2.5, 1.0, 1.0))),
    ]  # fmt: skip
    volume = scan()
    parts = [Predictor.from_run(path, precision="fp32")(volume, probabilities=True) for path in paths]
    both = Predictor.from_run(*paths, precision="fp32")(volume, probabilities=True)
    mean = sum(part.probabilities["tumour"] for part in parts) / 2
    np.testing.assert_allclose(both.probabilities["tumour"], mean, atol=1e-5)
    clear = np.abs(mean - 0.5) > 1e-4
    assert ((both.mask == 1) == (mean > 0.5))[clear].all()


def test_the_attention_map_lies_on_the_scans_grid(random_model):
    attention = exact(random_model)(scan(), attention=True).attention
    assert attention is not None and attention.shape == (30, 26, 12)
    assert attention.min() > 0 and attention.max() < 1 and attention.std() > 0


def test_networks_without_gates_have_no_attention_to_give(tmp_path):
    predictor = Predictor.from_run(save_model(tmp_path / "m", threshold_network()))
    with pytest.raises(UsageError, match="none of the networks has attention gates"):
        predictor(scan(), attention=True)


def test_postprocessing_of_training_is_used_and_can_be_turned_off(tmp_path):
    volume = Volume(np.full((20, 20, 8), -500, np.int16), np.diag([1, 1, 1, 1.0]))
    volume.array[2:8, 2:8, 2:6], volume.array[15, 15, 5] = 500, 500
    folder = save_model(tmp_path / "m", threshold_network(), postprocessing={"smallest_lesion_ml": 0.01})
    assert Predictor.from_run(folder, precision="fp32")(volume).mask.sum() == 6 * 6 * 4
    everything = Predictor.from_run(folder, precision="fp32", postprocessing=Postprocessing())
    assert everything(volume).mask.sum() == 6 * 6 * 4 + 1


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_lesions_of_little_mass_beside_the_largest_are_removed(tmp_path, threshold):
    volume = Volume(np.full((20, 20, 8), -500, np.int16), np.diag([1, 1, 1, 1.0]))
    volume.array[2:8, 2:8, 2:6], volume.array[15:17, 15, 5], volume.array[15:19, 2:8, 2:6] = 500, 500, 500
    model = TrainedModel.load(save_model(tmp_path / "m", threshold_network()))
    for share, voxels in ((0.0, 242), (0.2, 240), (0.8, 144)):
        options = Postprocessing(threshold=threshold, lesion_share=share)
        prediction = exact(model, postprocessing=options)(volume, probabilities=True)
        assert prediction.mask.sum() == voxels
        assert (prediction.probabilities["tumour"] > 0.5).sum() == 242


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 1, 2), (40, 3, 9)])
def test_scans_smaller_than_a_patch_are_padded_with_air(tmp_path, shape):
    predictor = exact(TrainedModel.load(save_model(tmp_path / "m", threshold_network())))
    volume = Volume(np.random.default_rng(0).integers(-900, 900, shape).astype(np.int16), np.eye(4))
    assert (predictor(volume).mask == (volume.array > 0)).all()


def streamed(predictor: Predictor, volume: Volume, **options) -> torch.Tensor:
    """All that a predictor streams of a scan, (K, Z, Y, X); what a new beginning voids is gone."""
    blocks = []
    for first, last, block in predictor.stream_probabilities(volume, **options):
        blocks = [] if first == 0 else blocks
        assert first == sum(part.shape[1] for part in blocks) and last - first == block.shape[1]
        blocks.append(block.clone())
    return torch.cat(blocks, 1)


@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 1.0)])
def test_the_stream_holds_the_probabilities_and_the_attention_of_a_prediction(tmp_path, spacing):
    plan = replace(HU, target_spacing_mm=spacing)
    models = [
        TrainedModel.load(save_model(tmp_path / "a", random_network(seed=1), preprocessing=plan)),
        TrainedModel.load(
            save_model(tmp_path / "b", random_network(seed=2, name="unet"), preprocessing=plan)
        ),
    ]
    predictor, volume = exact(*models), scan()
    prediction = predictor(volume, probabilities=True, attention=True)
    stream = streamed(predictor, volume, attention=True)
    background, tumour, attention = stream.numpy().transpose(0, 3, 2, 1)[:, ::-1]
    assert (tumour == prediction.probabilities["tumour"]).all() and (attention == prediction.attention).all()
    assert ((tumour > background) == prediction.mask).all()
    assert streamed(predictor, volume).shape[0] == 2


class Hungry(nn.Module):
    """Out of memory for more than ``most`` voxels at once."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most, self.seen = network, most, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        if x.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x)


def hungry(tmp_path, most) -> Predictor:
    model = TrainedModel.load(save_model(tmp_path / "m", threshold_network(), patch_size=(8, 64, 64)))
    return exact(replace(model, network=Hungry(model.network, most)), batch_size=4)


def test_a_full_gpu_gets_smaller_batches_and_then_smaller_patches(tmp_path, caplog):
    volume = scan((70, 70, 20))
    predictor = hungry(tmp_path, 2 * 8 * 64 * 64)
    prediction = predictor(volume)
    assert (prediction.mask == (volume.array > 0)).all() and prediction.warnings == ()
    assert "2 patches at a time" in caplog.text
    predictor = hungry(tmp_path, 8 * 32 * 32)
    prediction = predictor(volume)
    assert (prediction.mask == (volume.array > 0)).all()
    assert predictor.models[0].network.seen[-1][2:] == (8, 32, 32)
    assert "smaller patches" in prediction.warnings[0]


def test_where_nothing_helps_the_memory_is_named(tmp_path):
    with pytest.raises(ResourceError, match="out of memory even with the smallest patches"):
        hungry(tmp_path, 10)(scan((70, 70, 20)))


class Overflowing(nn.Module):
    """One voxel of every patch is ``value``; in fp32 too if so asked."""

    def __init__(self, network: nn.Module, value: float, *, always: bool) -> None:
        super().__init__()
        self.network, self.value, self.always = network, value, always

    def forward(self, x):
        logits = self.network(x).clone()
        if self.always or torch.is_autocast_enabled("cpu"):
            logits[:, 1, 0, 0, 0] = self.value
        return logits


def overflowing(tmp_path, value, *, always) -> TrainedModel:
    model = TrainedModel.load(save_model(tmp_path / "m", threshold_network()))
    return replace(model, network=Overflowing(model.network, value, always=always))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("probabilities", [False, True])
def test_numbers_that_bf16_cannot_hold_are_computed_in_fp32(tmp_path, value, probabilities):
    volume = scan((20, 20, 10))
    predictor = Predictor([overflowing(tmp_path, value, always=False)], precision="bf16")
    prediction = predictor(volume, probabilities=probabilities)
    assert (prediction.mask == (volume.array > 0)).all()
    assert prediction.precision == "fp32"
    assert "in bf16; predicted in fp32" in prediction.warnings[0]


@pytest.mark.parametrize("most", [8 * 32 * 32, 2 * 8 * 64 * 64])
def test_a_stream_begins_anew_where_memory_or_numbers_run_out(tmp_path, most):
    volume = scan((70, 70, 20))
    predictor = hungry(tmp_path, most)
    (model,) = predictor.models
    network = Overflowing(model.network, np.nan, always=False)
    found = streamed(Predictor([replace(model, network=network)], device="cpu", precision="bf16"), volume)
    assert ((found[1] > 0.5).numpy().transpose(2, 1, 0)[::-1] == (volume.array > 0)).all()


@pytest.mark.parametrize(
    ("recorded", "hardware", "used"),
    [("fp32", True, "fp32"), ("bf16", True, "bf16"), ("bf16", False, "fp32"), (None, True, "bf16")],
)
def test_auto_is_the_precision_of_validation_where_the_device_has_it(
    tmp_path, monkeypatch, recorded, hardware, used
):
    monkeypatch.setattr("lungkit.inference.precision.cpu_computes_bf16", lambda: hardware)
    entry = {} if recorded is None else {"precision": recorded}
    model = TrainedModel.load(save_model(tmp_path / "m", threshold_network(), **entry))
    assert model.precision == recorded
    assert Predictor([model], device="cpu")(scan()).precision == used


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_gives_nan_gives_no_mask(tmp_path, precision):
    predictor = Predictor([overflowing(tmp_path, np.nan, always=True)], precision=precision)
    with pytest.raises(DataError, match="m gives NaN or infinity for this scan"):
        predictor(scan((20, 20, 10)))


def test_memory_beyond_scan_and_mask_is_one_slab(tmp_path):
    model = TrainedModel.load(save_model(
        tmp_path / "m", threshold_network(dims=2), patch_size=(64, 64), preprocessing=HU))  # fmt: skip
    volume = Volume(np.zeros((128, 128, 400), np.int16), np.diag([1, 1, 1, 1.0]))
    exact(model)(volume)  # what is made once
    tracemalloc.start()
    exact(model)(volume)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # numpy's arrays: the mask (half of the scan) and some slices, no float copy of the scan (twice the scan).
    assert peak < 1.0 * volume.array.nbytes


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        (Volume(np.zeros((20, 20, 1), np.int16), np.eye(4)), "a single slice, but .* is a 3D model"),
        ([scan(), scan()], r"2 channels, but .* takes 1 \(CT\)"),
        ([], "image must be a path"),
        (np.zeros((4, 4, 4)), "image must be a path"),
    ],
)
def test_scans_that_do_not_fit_are_refused(random_model, volumes, message):
    with pytest.raises((DataError, UsageError), match=message):
        exact(random_model)(volumes)


def test_channels_on_different_grids_are_refused(tmp_path):
    plan = replace(HU, channels=(*HU.channels, ChannelNormalisation((0.0, 10.0), 0.0, 1.0, "PET")))
    folder = save_model(
        tmp_path / "m", threshold_network(channels=2), preprocessing=plan, channels=("CT", "PET")
    )
    with pytest.raises(DataError, match="must lie on one grid"):
        Predictor.from_run(folder)([scan(), scan((30, 26, 11))])


def test_models_of_different_labels_are_no_ensemble(tmp_path):
    paths = [
        save_model(tmp_path / "a", threshold_network()),
        save_model(tmp_path / "b", threshold_network(), label_values={"background": 0, "nodule": 1}),
    ]
    with pytest.raises(UsageError, match="must share their labels"):
        Predictor.from_run(*paths)


def test_eight_bit_pictures_for_a_model_of_hu_are_noticed(random_model):
    picture = Volume(np.random.default_rng(0).integers(0, 256, (20, 20, 9)).astype(np.uint8), np.eye(4))
    assert "looks like an 8-bit picture" in exact(random_model)(picture).warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap"), ({"batch_size": 0}, "batch_size"),
        ({"device": "abacus"}, "abacus"), ({"precision": "fp8"}, "precision"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(random_model, options, message):
    with pytest.raises(UsageError, match=message):
        Predictor([random_model], **options)


def test_progress_counts_the_patches(random_model):
    steps = []
    exact(random_model, batch_size=2)(scan(), progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 4 and steps == sorted(steps)


def test_a_file_is_read_and_a_truncated_one_named(tmp_path, random_model):
    write_nifti(tmp_path / "scan.nii.gz", scan().array, AFFINE)
    mask = exact(random_model)(tmp_path / "scan.nii.gz").mask
    assert (mask == exact(random_model)(read_volume(tmp_path / "scan.nii.gz")).mask).all()
    (tmp_path / "short.nii.gz").write_bytes((tmp_path / "scan.nii.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"short\.nii\.gz"):
        exact(random_model)(tmp_path / "short.nii.gz")
