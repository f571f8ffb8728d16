// The Python module lungkit._native._geometry: numpy arrays in, numpy arrays out, no torch.
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "surface_distances.h"

namespace py = pybind11;

namespace lungkit::geometry {
namespace {

using Labels = py::array_t<uint8_t, py::array::c_style>;

// Hands a vector to numpy without a copy.
py::array_t<float> to_numpy(std::vector<float>&& values) {
  auto owned = std::make_unique<std::vector<float>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owned->size());
  float* data = owned->data();
  const py::capsule owner(owned.get(),
                          [](void* pointer) { delete static_cast<std::vector<float>*>(pointer); });
  owned.release();
  return py::array_t<float>(size, data, owner);
}

std::vector<std::pair<py::array_t<float>, py::array_t<float>>> surface_distances_of(
    const Labels& prediction, const Labels& truth, const std::vector<double>& spacing_mm,
    const std::vector<uint8_t>& labels, int threads) {
  const auto dims = static_cast<size_t>(prediction.ndim());
  if (dims != 2 && dims != 3) throw std::invalid_argument("surface_distances: masks must have 2 or 3 axes");
  if (truth.ndim() != prediction.ndim() || spacing_mm.size() != dims) {
    throw std::invalid_argument("surface_distances: masks and spacing_mm must have the same number of axes");
  }
  Grid grid{{1, 1, 1}, {1.0, 1.0, 1.0}, dims == 2};
  for (size_t d = 0; d < dims; ++d) {
    if (prediction.shape(d) != truth.shape(d)) {
      throw std::invalid_argument("surface_distances: masks must have the same shape");
    }
    grid.size[3 - dims + d] = prediction.shape(d);
    grid.spacing_mm[3 - dims + d] = spacing_mm[d];
  }
  std::vector<SurfaceDistances> results;
  {
    const py::gil_scoped_release release;
    results = surface_distances(prediction.data(), truth.data(), grid, labels, threads);
  }
  std::vector<std::pair<py::array_t<float>, py::array_t<float>>> arrays;
  for (SurfaceDistances& result : results) {
    arrays.emplace_back(to_numpy(std::move(result.prediction_to_truth)),
                        to_numpy(std::move(result.truth_to_prediction)));
  }
  return arrays;
}

}  // namespace
}  // namespace lungkit::geometry

PYBIND11_MODULE(_geometry, module) {
  module.doc() = "Geometry of segmentations on numpy arrays; see lungkit.metrics.";
  module.def("surface_distances", &lungkit::geometry::surface_distances_of, py::arg("prediction").noconvert(),
             py::arg("truth").noconvert(), py::kw_only(), py::arg("spacing_mm"), py::arg("labels"),
             py::arg("threads"),
             "For every label the distances (prediction to truth, truth to prediction) in mm, float32.");
}
