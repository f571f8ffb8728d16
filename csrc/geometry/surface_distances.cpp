#include "surface_distances.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "parallel.h"

// The two inner loops over a row are compiled for AVX2 as well, and chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define LUNGKIT_ROW_KERNEL __attribute__((target_clones("default", "avx2")))
#else
#define LUNGKIT_ROW_KERNEL
#endif

namespace lungkit::geometry {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();
constexpr uint16_t kNone = std::numeric_limits<uint16_t>::max();
// Below this many voxels starting a thread costs more than it saves.
constexpr int64_t kVoxelsPerThread = 1 << 16;

struct Box {
  std::array<int64_t, 3> first{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max(),
                               std::numeric_limits<int64_t>::max()};
  std::array<int64_t, 3> last{-1, -1, -1};

  bool empty() const { return last[0] < 0; }
  int64_t size(int axis) const { return last[axis] - first[axis] + 1; }
  void add(int axis, int64_t low, int64_t high) {
    first[axis] = std::min(first[axis], low);
    last[axis] = std::max(last[axis], high);
  }
};

// The boundary voxels of one plane: columns of row y lie at x[row[y]] .. x[row[y + 1]].
struct PlaneBoundary {
  std::vector<int32_t> x;
  std::vector<int32_t> row;
};
using Boundary = std::vector<PlaneBoundary>;

int threads_for(int64_t voxels, int threads) {
  return static_cast<int>(std::clamp<int64_t>(voxels / kVoxelsPerThread, 1, threads));
}

bool all_zero(const uint8_t* row, int64_t n) {
  uint64_t seen = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, row + i, 8);
    seen |= word;
  }
  for (; i < n; ++i) seen |= row[i];
  return seen == 0;
}

// One pass over a volume: for every label the box that holds it in `prediction` and `truth` together.
std::vector<Box> joint_boxes(const uint8_t* prediction, const uint8_t* truth, const Grid& grid,
                             std::span<const uint8_t> labels, int threads) {
  std::array<int, 256> index_of;
  index_of.fill(-1);
  for (size_t l = 0; l < labels.size(); ++l) index_of[labels[l]] = static_cast<int>(l);

  const auto [nz, ny, nx] = grid.size;
  std::vector<Box> of_plane(nz * labels.size());
  parallel_for(nz, threads_for(nz * ny * nx, threads), [&](int64_t z) {
    Box* boxes = of_plane.data() + z * labels.size();
    for (int64_t y = 0; y < ny; ++y) {
      for (const uint8_t* volume : {prediction, truth}) {
        const uint8_t* row = volume + (z * ny + y) * nx;
        if (all_zero(row, nx)) continue;
        for (int64_t begin = 0, end; begin < nx; begin = end) {
          end = begin + 1;
          while (end < nx && row[end] == row[begin]) ++end;
          const int label = index_of[row[begin]];
          if (label < 0) continue;
          boxes[label].add(0, z, z);
          boxes[label].add(1, y, y);
          boxes[label].add(2, begin, end - 1);
        }
      }
    }
  });
  std::vector<Box> joint(labels.size());
  for (size_t i = 0; i < of_plane.size(); ++i) {
    if (of_plane[i].empty()) continue;
    for (int axis = 0; axis < 3; ++axis) {
      joint[i % labels.size()].add(axis, of_plane[i].first[axis], of_plane[i].last[axis]);
    }
  }
  return joint;
}

// edge[i] = 1 where row[i] is `label` and not all of the neighbours in the four given rows and on both sides
// are. row[-1] and row[n] are read: the caller sees to it that they exist.
LUNGKIT_ROW_KERNEL
void mark_boundary(const uint8_t* row, const uint8_t* up, const uint8_t* down, const uint8_t* front,
                   const uint8_t* back, uint8_t label, uint8_t* edge, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t inside =
        static_cast<uint8_t>((row[i - 1] == label) & (row[i + 1] == label) & (up[i] == label) &
                             (down[i] == label) & (front[i] == label) & (back[i] == label));
    edge[i] = static_cast<uint8_t>((row[i] == label) & (inside ^ 1));
  }
}

// best[i] = min(best[i], below[i] + offset, above[i] + offset)
LUNGKIT_ROW_KERNEL
void relax(float* best, const float* below, const float* above, float offset, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float nearer = below[i] < above[i] ? below[i] : above[i];
    const float through = nearer + offset;
    best[i] = through < best[i] ? through : best[i];
  }
}

Boundary find_boundary(const uint8_t* volume, const Grid& grid, const Box& box, uint8_t label, int threads) {
  const auto [nz, ny, nx] = grid.size;
  const int64_t width = box.size(2), height = box.size(1);
  const std::vector<uint8_t> outside(width, static_cast<uint8_t>(~label));
  Boundary boundary(box.size(0));
  parallel_for(box.size(0), threads_for(width * height * box.size(0), threads), [&](int64_t plane) {
    const int64_t z = box.first[0] + plane;
    std::vector<uint8_t> edge(width);
    PlaneBoundary& found = boundary[plane];
    found.row.assign(1, 0);
    for (int64_t y = box.first[1]; y <= box.last[1]; ++y) {
      const uint8_t* row = volume + (z * ny + y) * nx + box.first[2];
      const auto neighbour = [&](bool exists, int64_t step) { return exists ? row + step : outside.data(); };
      const uint8_t* up = neighbour(y > 0, -nx);
      const uint8_t* down = neighbour(y + 1 < ny, nx);
      // A 2D image has no neighbours in front and behind: the voxel itself stands in, which never makes an
      // edge.
      const uint8_t* front = grid.flat ? row : neighbour(z > 0, -nx * ny);
      const uint8_t* back = grid.flat ? row : neighbour(z + 1 < nz, nx * ny);
      // At the sides of the volume there is no voxel beyond the row; there every voxel of the label is
      // boundary.
      const int64_t begin = box.first[2] == 0 ? 1 : 0;
      const int64_t end = box.last[2] == nx - 1 ? width - 1 : width;
      edge.front() = row[0] == label;
      edge.back() = row[width - 1] == label;
      if (begin < end) {
        mark_boundary(row + begin, up + begin, down + begin, front + begin, back + begin, label,
                      edge.data() + begin, end - begin);
      }
      for (int64_t x = 0; x < width; ++x) {
        if (x + 8 <= width && all_zero(edge.data() + x, 8)) {
          x += 7;
          continue;
        }
        if (edge[x]) found.x.push_back(static_cast<int32_t>(x));
      }
      found.row.push_back(static_cast<int32_t>(found.x.size()));
    }
  });
  return boundary;
}

// The squared distance from every voxel of one plane to the nearest boundary voxel in its own line along y.
void line_distances(const PlaneBoundary& boundary, int64_t height, int64_t width, float spacing,
                    float* squared) {
  std::vector<uint16_t> above(height * width);  // steps to the nearest one at a smaller or equal y
  std::vector<uint16_t> steps(width, kNone);
  const auto advance = [&](int64_t y) {
    for (int64_t x = 0; x < width; ++x) steps[x] = static_cast<uint16_t>(steps[x] + (steps[x] != kNone));
    for (int32_t i = boundary.row[y]; i < boundary.row[y + 1]; ++i) steps[boundary.x[i]] = 0;
  };
  for (int64_t y = 0; y < height; ++y) {
    advance(y);
    std::copy(steps.begin(), steps.end(), above.begin() + y * width);
  }
  std::fill(steps.begin(), steps.end(), kNone);
  for (int64_t y = height - 1; y >= 0; --y) {
    advance(y);
    const uint16_t* from_above = above.data() + y * width;
    float* row = squared + y * width;
    for (int64_t x = 0; x < width; ++x) {
      const uint16_t nearest = std::min(steps[x], from_above[x]);
      const float distance = static_cast<float>(nearest) * spacing;
      row[x] = nearest == kNone ? kInfinite : distance * distance;
    }
  }
}

std::vector<float> squared_steps(int64_t n, double spacing) {
  std::vector<float> squares(n);
  for (int64_t i = 0; i < n; ++i) squares[i] = static_cast<float>(i * spacing * i * spacing);
  return squares;
}

// The least row[x'] + (x' - x)^2 spacing^2 over x', searched outwards from x.
float nearest_in_row(const float* row, int64_t width, int64_t x, const std::vector<float>& square) {
  float best = row[x];
  const int64_t reach = std::max(x, width - 1 - x);
  for (int64_t step = 1; step <= reach && square[step] < best; ++step) {
    if (step <= x) best = std::min(best, row[x - step] + square[step]);
    if (x + step < width) best = std::min(best, row[x + step] + square[step]);
  }
  return best;
}

// Distance of every voxel of `from` to the nearest voxel of `to`, in the order of `from`.
//
// Squared Euclidean distances separate: first along y for every voxel (two sweeps), then along z and x for
// the voxels that are asked for. Both of the latter search outwards and stop at the distance found so far, so
// that surfaces close to each other, the usual case, cost little.
std::vector<float> distances(const Boundary& from, const Boundary& to, const Grid& grid, const Box& box,
                             int threads) {
  const int64_t depth = box.size(0), height = box.size(1), width = box.size(2), plane = height * width;
  threads = threads_for(depth * plane, threads);
  const auto along_y = std::make_unique_for_overwrite<float[]>(depth * plane);
  parallel_for(depth, threads, [&](int64_t z) {
    line_distances(to[z], height, width, static_cast<float>(grid.spacing_mm[1]), along_y.get() + z * plane);
  });

  std::vector<int64_t> start(depth + 1, 0);
  for (int64_t z = 0; z < depth; ++z) start[z + 1] = start[z] + static_cast<int64_t>(from[z].x.size());
  std::vector<float> result(start.back());
  const std::vector<float> square_z = squared_steps(depth, grid.spacing_mm[0]);
  const std::vector<float> square_x = squared_steps(width, grid.spacing_mm[2]);
  parallel_for(depth, threads, [&](int64_t z) {
    std::vector<float> row(width);  // squared distances in the plane of y and z
    for (int64_t y = 0; y < height; ++y) {
      const int32_t* x = from[z].x.data() + from[z].row[y];
      const int64_t count = from[z].row[y + 1] - from[z].row[y];
      if (count == 0) continue;
      float* out = result.data() + start[z] + from[z].row[y];
      const auto farthest = [&] {
        float bound = 0;
        for (int64_t i = 0; i < count; ++i) {
          out[i] = nearest_in_row(row.data(), width, x[i], square_x);
          bound = std::max(bound, out[i]);
        }
        return bound;
      };
      const float* centre = along_y.get() + z * plane + y * width;
      std::copy(centre, centre + width, row.data());
      float bound = farthest();
      const int64_t reach = std::max(z, depth - 1 - z);
      for (int64_t step = 1; step <= reach && square_z[step] < bound; ++step) {
        const float* below = step <= z ? centre - step * plane : centre + step * plane;
        const float* above = z + step < depth ? centre + step * plane : below;
        relax(row.data(), below, above, square_z[step], width);
        // The bound is brought up to date at 1, 2, 4, 8, ...: often enough to stop soon, rarely enough to
        // cost little.
        if ((step & (step - 1)) == 0) bound = farthest();
      }
      farthest();
      for (int64_t i = 0; i < count; ++i) out[i] = std::sqrt(out[i]);
    }
  });
  return result;
}

}  // namespace

std::vector<SurfaceDistances> surface_distances(const uint8_t* prediction, const uint8_t* truth,
                                                const Grid& grid, std::span<const uint8_t> labels,
                                                int threads) {
  std::vector<SurfaceDistances> results(labels.size());
  const std::vector<Box> boxes = joint_boxes(prediction, truth, grid, labels, threads);
  for (size_t l = 0; l < labels.size(); ++l) {
    const Box& box = boxes[l];
    if (box.empty()) continue;
    if (box.size(1) >= kNone || box.size(2) > std::numeric_limits<int32_t>::max()) {
      throw std::length_error("surface_distances: label " + std::to_string(labels[l]) + " spans " +
                              std::to_string(box.size(1)) + " rows; at most 65534 are supported");
    }
    const Boundary of_prediction = find_boundary(prediction, grid, box, labels[l], threads);
    const Boundary of_truth = find_boundary(truth, grid, box, labels[l], threads);
    results[l].prediction_to_truth = distances(of_prediction, of_truth, grid, box, threads);
    results[l].truth_to_prediction = distances(of_truth, of_prediction, grid, box, threads);
  }
  return results;
}

}  // namespace lungkit::geometry
