// cet._cuda: what csrc/cuda offers, on raw pointers. The callers in cet check the tensors and own the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "kernels.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T at(Pointer pointer) {
  return reinterpret_cast<T>(pointer);
}

int driver_version() {
  int version = 0;
  cet::cuda::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

#if CUDART_VERSION >= 12080
using cet::cuda::SwitchGraph;

std::unique_ptr<SwitchGraph> switch_graph(int device, const std::vector<std::vector<Pointer>>& graphs,
                                          const std::vector<std::vector<int32_t>>& buckets, Pointer counts) {
  std::vector<std::vector<cudaGraph_t>> raw;
  for (const auto& of_segment : graphs) {
    auto& row = raw.emplace_back();
    for (const Pointer graph : of_segment) row.push_back(at<cudaGraph_t>(graph));
  }
  const py::gil_scoped_release release;
  const cet::cuda::DeviceGuard guard(device);
  return std::make_unique<SwitchGraph>(raw, buckets, at<int32_t*>(counts));
}
#endif

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "The CUDA part of cet on raw pointers.";
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("driver_version", &driver_version, "The CUDA version that the driver supports, 0 without one.");
#if CUDART_VERSION >= 12080
  module.attr("has_switch") = true;
  py::class_<SwitchGraph>(module, "SwitchGraph")
      .def(py::init(&switch_graph))
      .def("launch", [](const SwitchGraph& graph, Pointer stream) {
        const py::gil_scoped_release release;
        graph.launch(at<cudaStream_t>(stream));
      });
#else
  module.attr("has_switch") = false;
#endif
}
