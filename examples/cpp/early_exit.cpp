// Answers the rows of a file of float32 numbers one by one from a package that cet.export wrote, without Python:
// a row runs one stage after the other until its score lets it leave.
//
//   early_exit model.pt2 rows.f32
//
// For models with one input of float32, and sizes that the package fixes.
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using json = nlohmann::ordered_json;  // the inputs of a stage in their order

json manifest_of(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  const auto [data, size] = reader.getRecord("extra/cet");
  const char* text = static_cast<const char*>(data.get());
  return json::parse(text, text + size);
}

// A threshold may be null for a closed exit, or the text "inf" or "-inf".
bool leaves(float score, const json& threshold, bool at_or_below) {
  if (threshold.is_null()) return false;
  const float limit = threshold.is_string() ? std::stof(threshold.get<std::string>()) : threshold.get<float>();
  return at_or_below ? score <= limit : score >= limit;  // false for NaN
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: early_exit model.pt2 rows.f32\n");
    return 2;
  }
  const c10::InferenceMode guard;
  const json manifest = manifest_of(argv[1]);
  const json &model = manifest["model"], &stages = manifest["stages"], &input = model["inputs"][0];
  const bool at_or_below = manifest["leaves"] == "at or below";
  std::vector<std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> runners;
  for (const json& stage : stages) {
    runners.push_back(std::make_unique<torch::inductor::AOTIModelPackageLoader>(argv[1], stage["file"], true));
  }

  std::vector<int64_t> shape{1};
  for (size_t dim = 1; dim < input["shape"].size(); ++dim) shape.push_back(input["shape"][dim]);
  const int64_t numbers = c10::multiply_integers(shape);
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const auto rows = static_cast<int64_t>(bytes.size() / sizeof(float)) / numbers;

  for (int64_t row = 0; row < rows; ++row) {
    float* first = reinterpret_cast<float*>(bytes.data()) + row * numbers;
    std::map<std::string, at::Tensor> values{{input["name"], torch::from_blob(first, shape)}};
    for (size_t k = 0; k < stages.size(); ++k) {
      std::vector<at::Tensor> taken;
      for (const auto& [name, dim] : stages[k]["inputs"].items()) taken.push_back(values.at(name));
      const std::vector<at::Tensor> made = runners[k]->run(taken);
      const int exit = stages[k]["exit_index"];
      if (k + 1 == stages.size() || leaves(made[1].item<float>(), model["thresholds"][exit], at_or_below)) {
        std::printf("%d %d %.6f\n", exit, made[0].argmax(1).item<int>(), made[1].item<float>());
        break;
      }
      for (size_t i = 0; i < stages[k]["outputs"].size(); ++i) values[stages[k]["outputs"][i]] = made[2 + i];
    }
  }
}
