"""Images read, kept, padded and handed on a few axial slices at a time."""

from __future__ import annotations

import pytest
import torch

from lungkit.data.slices import (
    BufferedSlices,
    ContextSlices,
    PaddedSlices,
    ResampledSlices,
    StreamedSlices,
    TensorSlices,
)


def read_in_pieces(slices, step):
    depth = slices.shape[1]
    return torch.cat(
        [slices.read(first, min(first + step, depth)).clone() for first in range(0, depth, step)], 1
    )


def test_streamed_slices_are_those_of_the_parts_though_a_part_is_overwritten():
    image = torch.arange(22.0).reshape(1, 11, 2, 1)

    def parts():
        buffer = torch.empty(1, 3, 2, 1)
        for first in range(0, 11, 3):
            last = min(first + 3, 11)
            buffer[:, : last - first] = image[:, first:last]
            yield first, last, buffer[:, : last - first]
            buffer.fill_(-1)

    slices = StreamedSlices(parts(), (1, 11, 2, 1))
    for first, last in [(0, 2), (1, 4), (3, 8), (7, 8), (8, 11)]:
        assert torch.equal(slices.read(first, last), image[:, first:last])


def test_slices_that_patches_share_are_read_once():
    asked = []

    class Counting(TensorSlices):
        def read(self, first, last):
            asked.append((first, last))
            return super().read(first, last)

    slices = BufferedSlices(Counting(torch.arange(10.0).reshape(1, 10, 1, 1)))
    for first in range(0, 7, 2):
        assert slices.read(first, first + 4).flatten().tolist() == list(range(first, first + 4))
    assert asked == [(0, 4), (4, 6), (6, 8), (8, 10)]


def test_slices_resampled_to_their_own_size_stay_as_they_are():
    image = torch.randn(2, 5, 4, 3)
    assert torch.equal(read_in_pieces(ResampledSlices(TensorSlices(image), (5, 4, 3)), 2), image)


def test_padding_is_the_smallest_value_of_each_channel_and_goes_round_the_image():
    image = torch.randn(2, 5, 4, 3)
    padded = PaddedSlices(TensorSlices(image), (3, 0, 2), (1, 0, 1))
    assert padded.shape == (2, 8, 4, 5)
    found = read_in_pieces(padded, 3)
    assert torch.equal(found[:, 1:6, :, 1:4], image)
    found[:, 1:6, :, 1:4] = torch.nan
    for channel, smallest in zip(found, image.flatten(1).amin(1), strict=True):
        assert channel[~channel.isnan()].unique().tolist() == [smallest.item()]


def test_a_scan_is_padded_though_it_is_read_in_several_parts():
    # More voxels than are read at once: looking for the smallest value reads all of them before they are asked for.
    image = torch.arange(5.0)[None, :, None, None].expand(1, 5, 1024, 1024)
    padded = PaddedSlices(BufferedSlices(TensorSlices(image)), (2, 0, 0), (1, 0, 0))
    assert padded.read(0, 7)[0, :, 3, 5].tolist() == [0, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_context_repeats_the_first_and_the_last_slice(step):
    image = torch.randn(2, 5, 3, 2)
    found = read_in_pieces(ContextSlices(TensorSlices(image), 2), step)
    edges = torch.cat([image[:, :1], image[:, :1], image, image[:, -1:], image[:, -1:]], 1)
    assert torch.equal(found, torch.cat([edges[:, k : k + 5] for k in range(5)]))
