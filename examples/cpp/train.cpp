// Train from an artifact without Python: gradient descent on a penalty of a network 2-16-1.
//
//   python penalty.py            (compiles penalty.pt2 and unpacks it to penalty/)
//   cmake -B build -DCMAKE_PREFIX_PATH=$(python -c "import torch; print(torch.utils.cmake_prefix_path)")
//   cmake --build build && build/train penalty/program0/step.pt2
#include <cmath>
#include <cstdio>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: train STEP.pt2\n"), 2;
  torch::NoGradGuard no_grad;  // gradients are outputs of the step
  torch::manual_seed(0);
  torch::inductor::AOTIModelPackageLoader step(argv[1]);

  // The step's inputs in the order of manifest.json, programs[0].inputs.
  torch::Tensor x = torch::randn({64, 2});
  std::vector<torch::Tensor> parameters = {
      torch::randn({16, 2}) / std::sqrt(2.0), torch::zeros({16}),
      torch::randn({1, 16}) / 4.0, torch::zeros({1})};

  double first = 0, last = 0;
  for (int i = 0; i < 100; ++i) {
    std::vector<torch::Tensor> inputs = {x};
    inputs.insert(inputs.end(), parameters.begin(), parameters.end());
    // Outputs, state updates, then a gradient for each input that has one.
    std::vector<torch::Tensor> results = step.run(inputs);
    last = results[0].item<double>();
    if (i == 0) first = last;
    for (size_t k = 1; k < results.size(); ++k) parameters[k - 1].sub_(results[k], 0.05);
  }
  std::printf("loss %.6f -> %.6f\n", first, last);
  return last < 0.5 * first ? 0 : 1;
}
