// Answers the rows of a file of float32 numbers one by one from a package that cet.export wrote, without Python. Of a
// package for one row (batch=1), one model branches by itself; of one for any number of rows, each stage is a model,
// and a row runs one after the other until its score lets it leave.
//
//   early_exit model.pt2 rows.f32
//
// For models with one input of float32, and sizes that the package fixes.
#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using json = nlohmann::ordered_json;  // the inputs of a stage in their order

using Runner = torch::inductor::AOTIModelPackageLoader;

json manifest_of(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  const auto [data, size] = reader.getRecord("extra/cet");
  const char* text = static_cast<const char*>(data.get());
  return json::parse(text, text + size);
}

// A threshold may be null for a closed exit, or the text "inf" or "-inf".
float limit_of(const json& threshold, bool at_or_below) {
  if (threshold.is_null()) return at_or_below ? -INFINITY : INFINITY;
  return threshold.is_string() ? std::stof(threshold.get<std::string>()) : threshold.get<float>();
}

void print(int64_t exit, const at::Tensor& logits, const at::Tensor& score) {
  std::printf("%d %d %.6f\n", static_cast<int>(exit), logits.argmax(1).item<int>(), score.item<float>());
}

// One model, which takes the thresholds last.
void answer_by_branches(const std::string& path, const json& model, const std::vector<at::Tensor>& rows) {
  Runner runner(path, "one_row", true);
  std::vector<float> limits;
  for (const json& threshold : model["thresholds"]) limits.push_back(limit_of(threshold, model["score"] == "entropy"));
  const at::Tensor thresholds = at::tensor(limits);
  for (const at::Tensor& row : rows) {
    const std::vector<at::Tensor> made = runner.run({row, thresholds});
    print(made[1].item<int64_t>(), made[0], made[2]);
  }
}

// A model per stage.
void answer_by_stages(const std::string& path, const json& manifest, const std::vector<at::Tensor>& rows) {
  const json &model = manifest["model"], &stages = manifest["stages"];
  const bool at_or_below = manifest["leaves"] == "at or below";
  std::vector<std::unique_ptr<Runner>> runners;
  for (const json& stage : stages) runners.push_back(std::make_unique<Runner>(path, stage["file"], true));
  for (const at::Tensor& row : rows) {
    std::map<std::string, at::Tensor> values{{model["inputs"][0]["name"], row}};
    for (size_t k = 0; k < stages.size(); ++k) {
      std::vector<at::Tensor> taken;
      for (const auto& [name, dim] : stages[k]["inputs"].items()) taken.push_back(values.at(name));
      const std::vector<at::Tensor> made = runners[k]->run(taken);
      const int exit = stages[k]["exit_index"];
      bool leaves = k + 1 == stages.size();
      if (!leaves) {
        const float score = made[1].item<float>(), limit = limit_of(model["thresholds"][exit], at_or_below);
        leaves = at_or_below ? score <= limit : score >= limit;  // false for NaN
      }
      if (leaves) {
        print(exit, made[0], made[1]);
        break;
      }
      for (size_t i = 0; i < stages[k]["outputs"].size(); ++i) values[stages[k]["outputs"][i]] = made[2 + i];
    }
  }
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: early_exit model.pt2 rows.f32\n");
    return 2;
  }
  const c10::InferenceMode guard;
  const json manifest = manifest_of(argv[1]);
  const bool has_stages = manifest.contains("stages");
  const json& model = has_stages ? manifest["model"] : manifest;

  std::vector<int64_t> shape{1};
  const json& wanted = model["inputs"][0]["shape"];
  for (size_t dim = 1; dim < wanted.size(); ++dim) shape.push_back(wanted[dim]);
  const size_t bytes_per_row = c10::multiply_integers(shape) * sizeof(float);
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<at::Tensor> rows;
  for (size_t at = 0; at + bytes_per_row <= bytes.size(); at += bytes_per_row) {
    rows.push_back(at::from_blob(bytes.data() + at, shape));
  }
  has_stages ? answer_by_stages(argv[1], manifest, rows) : answer_by_branches(argv[1], model, rows);
}
