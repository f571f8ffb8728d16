// Distances between the surfaces of two segmentations, in mm.
//
// The surface of a label is its boundary voxels: those with a face neighbour (6 in 3D, 4 in 2D) of another
// label, where what lies outside the volume counts as another label. The distance of a boundary voxel to the
// other surface is the exact Euclidean distance between voxel centres to its nearest boundary voxel.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace lungkit::geometry {

// A volume of labels in C order; a 2D image has size[0] = 1 and `flat` set, and then no neighbours along axis
// 0.
struct Grid {
  std::array<int64_t, 3> size;
  std::array<double, 3> spacing_mm;
  bool flat = false;
};

// One distance for every boundary voxel; infinite where the other surface is empty.
struct SurfaceDistances {
  std::vector<float> prediction_to_truth;
  std::vector<float> truth_to_prediction;
};

// The distances of every label in `labels` (none of them 0), in that order; the same for any number of
// threads.
std::vector<SurfaceDistances> surface_distances(const uint8_t* prediction, const uint8_t* truth,
                                                const Grid& grid, std::span<const uint8_t> labels,
                                                int threads);

}  // namespace lungkit::geometry
