// cet._C: the CPU kernels on raw pointers. Sizes and strides are those of the tensors, strides in elements; the callers in
// cet.ops check them and own the memory. Arguments have names and are passed by position: a struct made in Python, or
// keywords, would cost more than a small kernel takes, so the structs of kernels.h are filled here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "watch.h"

namespace py = pybind11;

namespace {

using cet::Kernels;
using Pointer = std::uintptr_t;
using Sizes = std::vector<int64_t>;

template <class T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> kernels = {&cet::baseline::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {  // every CPU with both has F16C
    kernels.push_back(&cet::avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      kernels.push_back(&cet::avx512::kernels);
    }
  }
#endif
  return kernels;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

const Kernels* kernels_of(const std::string& capability) {
  for (const Kernels* kernels : supported()) {
    if (capability == kernels->name) return kernels;
  }
  throw py::value_error("this build and processor have no CPU capability '" + capability + "'");
}

// A score that Python knows and this build does not is one that was added since it was compiled.
cet::Score score_at(int number) {
  if (number < 0 || number >= static_cast<int>(std::size(cet::kScoreRules))) {
    throw py::value_error("the compiled kernels know no score of number " + std::to_string(number) +
                          "; build them again: make setup");
  }
  return cet::Score(number);
}

std::vector<std::string> scores() {
  std::vector<std::string> names;
  for (const cet::ScoreRule& rule : cet::kScoreRules) names.emplace_back(rule.name);
  return names;
}

// The dimensions of a pair of tensors of one shape, in descending order of the first one's strides. Those that neighbour
// each other in the memory of both become one; dimension `kept` stays alone.
struct Dims {
  Sizes size, stride, other;
  int keep = -1;

  Dims(const Sizes& sizes, const Sizes& strides, const Sizes& others, int kept) {
    for (int d = 0; d < static_cast<int>(sizes.size()); ++d) {
      if (sizes[d] == 1 && d != kept) continue;
      size_t at = size.size();
      while (at > 0 && stride[at - 1] < strides[d]) --at;
      if (keep >= static_cast<int>(at)) ++keep;
      if (d == kept) keep = static_cast<int>(at);
      size.insert(size.begin() + at, sizes[d]);
      stride.insert(stride.begin() + at, strides[d]);
      other.insert(other.begin() + at, others[d]);
    }
    for (size_t d = size.size(); d-- > 1;) {
      const bool joins = keep != static_cast<int>(d) && keep != static_cast<int>(d) - 1 &&
                         stride[d - 1] == size[d] * stride[d] && other[d - 1] == size[d] * other[d];
      if (!joins) continue;
      size[d - 1] *= size[d];
      stride[d - 1] = stride[d];
      other[d - 1] = other[d];
      for (Sizes* list : {&size, &stride, &other}) list->erase(list->begin() + d);
      if (keep > static_cast<int>(d)) --keep;
    }
  }
};

void gate(const Kernels& kernels, Pointer logits, int dtype, const Sizes& shape, const Sizes& strides, int score,
          float threshold, float temperature, Pointer scores, Pointer exit_mask, int threads) {
  const cet::Logits x = {at<void>(logits), cet::DType(dtype), shape[0], shape[1], strides[0], strides[1]};
  const cet::Decision decision = {score_at(score), threshold, temperature, at<float>(scores), at<bool>(exit_mask)};
  const py::gil_scoped_release release;
  kernels.gate({x, decision, threads});
}

// The features, and what a row of them is pooled over: all dimensions between batch and channels, or none.
struct Pooling {
  Dims positions = {{}, {}, {}, -1};
  cet::Features features;

  Pooling(Pointer data, int dtype, const Sizes& shape, const Sizes& strides, bool channels_last, bool mean) {
    const size_t channel = channels_last ? shape.size() - 1 : 1;
    if (mean && shape.size() > 2) {
      const size_t first = channels_last ? 1 : 2, last = channels_last ? shape.size() - 1 : shape.size();
      const Sizes stride(strides.begin() + first, strides.begin() + last);
      positions = Dims(Sizes(shape.begin() + first, shape.begin() + last), stride, stride, -1);
    }
    features = {at<void>(data),
                cet::DType(dtype),
                shape[0],
                shape[channel],
                strides[0],
                strides[channel],
                static_cast<int>(positions.size.size()),
                positions.size.data(),
                positions.stride.data()};
  }
};

// The exit mask, order and kept_rows may be null.
int64_t exit_gate(const Kernels& kernels, Pointer features, int dtype, const Sizes& shape, const Sizes& strides,
                  bool channels_last, bool mean, Pointer weight, Pointer bias, int64_t classes, Pointer logits, int score,
                  float threshold, float temperature, Pointer scores, Pointer exit_mask, Pointer order, Pointer kept_rows,
                  int64_t capacity, int threads) {
  const Pooling pooling(features, dtype, shape, strides, channels_last, mean);
  const py::gil_scoped_release release;
  std::unique_ptr<bool[]> flags;
  if (!exit_mask) flags.reset(new bool[pooling.features.rows]);
  const cet::Head head = {at<void>(weight), at<void>(bias), at<void>(logits), classes};
  const cet::Decision decision = {score_at(score), threshold, temperature, at<float>(scores),
                                  exit_mask ? at<bool>(exit_mask) : flags.get()};
  const cet::KeptRows moved = {at<char>(kept_rows), capacity, at<int64_t>(order)};
  return kernels.exit_gate({pooling.features, head, decision, order ? &moved : nullptr, threads});
}

void pool(const Kernels& kernels, Pointer features, int dtype, const Sizes& shape, const Sizes& strides,
          bool channels_last, bool mean, Pointer pooled, int threads) {
  const Pooling pooling(features, dtype, shape, strides, channels_last, mean);
  const py::gil_scoped_release release;
  kernels.pool({pooling.features, at<void>(pooled), threads});
}

int64_t order_rows(const Kernels& kernels, Pointer exit_mask, int64_t rows, Pointer order) {
  const py::gil_scoped_release release;
  return kernels.order_rows(at<bool>(exit_mask), rows, at<int64_t>(order));
}

// from, to, bytes per element, shape of the destination, strides of source and destination, dimension of the rows.
using RowTensor = std::tuple<Pointer, Pointer, int64_t, Sizes, Sizes, Sizes, int>;

void gather_rows(const Kernels& kernels, const std::vector<RowTensor>& tensors, Pointer index, int threads) {
  std::vector<Dims> dims;
  std::vector<cet::RowTensor> moves;
  dims.reserve(tensors.size());
  for (auto [from, to, itemsize, shape, from_strides, to_strides, row_dim] : tensors) {
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) continue;
    for (auto* strides : {&from_strides, &to_strides}) {
      for (int64_t& stride : *strides) stride *= itemsize;
    }
    Dims& d = dims.emplace_back(shape, to_strides, from_strides, row_dim);
    int64_t chunk = itemsize;
    int count = static_cast<int>(d.size.size());
    if (d.keep != count - 1 && d.stride.back() == itemsize && d.other.back() == itemsize) {
      chunk *= d.size.back();
      --count;
    }
    moves.push_back({at<char>(from), at<char>(to), chunk, count, d.keep, d.size.data(), d.other.data(), d.stride.data()});
  }
  const py::gil_scoped_release release;
  kernels.gather_rows({moves.data(), static_cast<int64_t>(moves.size()), at<int64_t>(index), threads});
}

void check_indices(const char* name, const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= rows) {
      throw py::index_error("scatter_rows: " + std::string(name) + "[" + std::to_string(i) + "] is " +
                            std::to_string(indices[i]) + " for " + std::to_string(rows) + " rows; give numbers in [0, " +
                            std::to_string(rows) + ")");
    }
  }
}

void scatter_rows(const Kernels& kernels, Pointer from, int64_t from_rows, Pointer to, int64_t to_rows, int64_t row_bytes,
              Pointer index, int64_t count, Pointer positions) {
  check_indices("index", at<int64_t>(index), count, positions ? from_rows : std::min(from_rows, to_rows));
  if (positions) check_indices("positions", at<int64_t>(positions), from_rows, to_rows);
  const py::gil_scoped_release release;
  kernels.scatter_rows({at<char>(from), at<char>(to), row_bytes, at<int64_t>(index), count, at<int64_t>(positions)});
}

// Row stride and gradient, or 0, behind each of the clean and the perturbed logits; the weight of the exit.
using ExitLogits = std::tuple<Pointer, int64_t, Pointer, Pointer, int64_t, Pointer, float>;

void check_labels(const int64_t* labels, int64_t rows, int64_t classes) {
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] != cet::kUnlabelled && (labels[row] < 0 || labels[row] >= classes)) {
      throw py::value_error("labels[" + std::to_string(row) + "] is " + std::to_string(labels[row]) + " for " +
                            std::to_string(classes) + " classes; give labels in [0, " + std::to_string(classes) +
                            "), or -100 for a row without one");
    }
  }
}

void consistent_exit_loss(const Kernels& kernels, const std::vector<ExitLogits>& logits, int dtype, int64_t rows,
                          int64_t classes, Pointer labels, float consistency_weight, float min_confidence,
                          bool hard_target, bool final_teacher, Pointer loss, Pointer supervised, Pointer consistency,
                          Pointer confident, int threads) {
  check_labels(at<int64_t>(labels), rows, classes);
  std::vector<cet::ExitLogits> exits;
  for (const auto& [clean, clean_stride, clean_grad, perturbed, perturbed_stride, perturbed_grad, weight] : logits) {
    exits.push_back({at<void>(clean), at<void>(perturbed), clean_stride, perturbed_stride, at<void>(clean_grad),
                     at<void>(perturbed_grad), weight});
  }
  const cet::LossConfig config = {cet::DType(dtype),
                                    static_cast<int64_t>(exits.size()),
                                    rows,
                                    classes,
                                    at<int64_t>(labels),
                                    consistency_weight,
                                    min_confidence,
                                    hard_target,
                                    final_teacher};
  const py::gil_scoped_release release;
  std::vector<cet::ExitTerms> terms(exits.size());
  kernels.consistent_exit_loss({config, exits.data(), terms.data(), threads});
  double total = 0.0;
  for (size_t k = 0; k < exits.size(); ++k) {
    total += exits[k].weight * (terms[k].supervised + consistency_weight * terms[k].consistency);
    at<float>(supervised)[k] = static_cast<float>(terms[k].supervised);
    at<float>(consistency)[k] = static_cast<float>(terms[k].consistency);
    at<float>(confident)[k] = static_cast<float>(terms[k].confident);
  }
  *at<float>(loss) = static_cast<float>(total);
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "The CPU kernels of cet.ops on raw pointers.";
  cet::bind_watch(module);
  module.def("capabilities", &capabilities, "Sets of instructions that this build and processor have, lowest first.");
  module.def("kernels", &kernels_of, py::arg("capability"), py::return_value_policy::reference,
             "The kernels compiled for one of capabilities().");
  module.def("scores", &scores, "Names of the scores, in the order of the numbers by which the kernels know them.");
  module.attr("UNLABELLED") = cet::kUnlabelled;
  module.attr("HALF_GRADIENT_SCALE") = cet::kHalfGradientScale;
  using py::arg;
  py::class_<Kernels>(module, "Kernels")
      .def_readonly("capability", &Kernels::name)
      .def("gate", &gate, arg("logits"), arg("dtype"), arg("shape"), arg("strides"), arg("score"), arg("threshold"),
           arg("temperature"), arg("scores"), arg("exit_mask"), arg("threads"))
      .def("exit_gate", &exit_gate, arg("features"), arg("dtype"), arg("shape"), arg("strides"), arg("channels_last"),
           arg("mean"), arg("weight"), arg("bias"), arg("classes"), arg("logits"), arg("score"), arg("threshold"),
           arg("temperature"), arg("scores"), arg("exit_mask"), arg("order"), arg("kept_rows"), arg("capacity"),
           arg("threads"))
      .def("pool", &pool, arg("features"), arg("dtype"), arg("shape"), arg("strides"), arg("channels_last"), arg("mean"),
           arg("pooled"), arg("threads"))
      .def("order_rows", &order_rows, arg("exit_mask"), arg("rows"), arg("order"))
      .def("gather_rows", &gather_rows, arg("tensors"), arg("index"), arg("threads"))
      .def("scatter_rows", &scatter_rows, arg("rows"), arg("num_rows"), arg("output"), arg("output_rows"),
           arg("row_bytes"), arg("index"), arg("count"), arg("positions"))
      .def("consistent_exit_loss", &consistent_exit_loss, arg("exits"), arg("dtype"), arg("rows"), arg("classes"),
           arg("labels"), arg("consistency_weight"), arg("min_confidence"), arg("hard_target"), arg("final_teacher"),
           arg("loss"), arg("supervised"), arg("consistency"), arg("confident"), arg("threads"));
}
