// The extension dpo_fast._native, which takes addresses and numbers and writes results in place. Its only caller,
// dpo_fast/kernels/native.py, has checked every shape, dtype and device; address 0 stands for an absent array.
#include <pybind11/pybind11.h>

#include "arithmetic.h"
#include "ops.h"

#ifndef DPO_FAST_CUBINS  // setup.py defines both when it builds CUDA kernels
#define DPO_FAST_CUBINS ""
#define DPO_FAST_PTX ""
#endif

namespace py = pybind11;

namespace dpo_fast {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Array {  // its dtype is known only at run time
  Address address;
  int dtype;
  operator ConstArray() const { return {pointer<const void>(address), dtype}; }
  operator MutableArray() const { return {pointer<void>(address), dtype}; }
};

struct Place {
  int device;      // CUDA device ordinal, or -1 for the CPU
  Address stream;  // CUDA only
  int threads;     // CPU only
};

template <typename Op>
void run(const Op& op, const Place& place, void (*on_cpu)(const Op&, int), void (*on_gpu)(const Op&, cuda::Stream)) {
  const py::gil_scoped_release release;
  if (place.device < 0) {
    on_cpu(op, place.threads);
  } else {
    on_gpu(op, {place.device, pointer<void>(place.stream)});
  }
}

void noise_pair(
    const Place& place, Array latents, Address signal, Address sigma, uint64_t seed, Address pair_id, Address draw,
    Array noisy, Address target, int64_t pairs, int64_t channels, int64_t pixels, bool channels_last, bool velocity) {
  const NoisePair op = {
      latents, pointer<const float>(signal), pointer<const float>(sigma), pointer<const int64_t>(pair_id),
      pointer<const int64_t>(draw), seed, noisy, pointer<float>(target), pairs, channels, pixels, channels_last,
      velocity};
  run(op, place, cpu::noise_pair, cuda::noise_pair);
}

PairErrors errors_of(
    Array policy, Array ref, Address ref_error, Array target, int64_t pairs, int64_t targets, int64_t elements,
    Address sums, Address policy_error_out, Address ref_error_out, Address error_delta_out) {
  return {
      policy, ref, pointer<const float>(ref_error), target, pairs, targets, elements, pointer<float>(sums),
      pointer<float>(policy_error_out), pointer<float>(ref_error_out), pointer<float>(error_delta_out)};
}

void pair_errors(const Place& place, const PairErrors& op) { run(op, place, cpu::pair_errors, cuda::pair_errors); }

PairErrorsGrad errors_grad_of(
    Address grad_error, Array policy, Array target, int64_t pairs, int64_t targets, int64_t elements, Array grad) {
  return {pointer<const float>(grad_error), policy, target, pairs, targets, elements, grad};
}

void pair_errors_grad(const Place& place, const PairErrorsGrad& op) {
  run(op, place, cpu::pair_errors_grad, cuda::pair_errors_grad);
}

void dpo_loss(
    const Place& place, const PairErrors& errors, double beta, Address label, Address weight, Address loss,
    Address margin) {
  const DPOLoss op = {errors, beta, pointer<const float>(label), pointer<const float>(weight), pointer<float>(loss),
                      pointer<float>(margin)};
  run(op, place, cpu::dpo_loss, cuda::dpo_loss);
}

void dpo_loss_grad(
    const Place& place, const PairErrorsGrad& errors, Address grad_loss, Address margin, Address label, Address weight,
    double beta) {
  const DPOLossGrad op = {pointer<const float>(grad_loss), pointer<const float>(margin), pointer<const float>(label),
                          pointer<const float>(weight), beta, errors};
  run(op, place, cpu::dpo_loss_grad, cuda::dpo_loss_grad);
}

int64_t pair_sums_floats(const Place& place, int64_t images, int64_t elements) {
  return (place.device < 0 ? cpu::pair_sums_floats : cuda::pair_sums_floats)(images, elements);
}

// Only the Philox generator, to check against the published test vectors.
py::tuple philox_words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  const Words words = philox({{c0, c1, c2, c3}}, key0, key1);
  return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
}

// Only the exponential function, on float32 [count].
void exponentials(Address x, Address y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pointer<float>(y)[i] = exponential(pointer<const float>(x)[i]);
}

}  // namespace
}  // namespace dpo_fast

PYBIND11_MODULE(_native, module) {
  using namespace dpo_fast;
  const py::module_local local;  // so that one process can load two builds
  py::class_<Array>(module, "Array", local).def(py::init<Address, int>(), py::arg("address"), py::arg("dtype"));
  py::class_<Place>(module, "Place", local)
      .def(py::init<int, Address, int>(), py::arg("device"), py::arg("stream"), py::arg("threads"));
  py::class_<PairErrors>(module, "PairErrors", local)
      .def(
          py::init(&errors_of), py::arg("policy"), py::arg("ref"), py::arg("ref_error"), py::arg("target"),
          py::arg("pairs"), py::arg("targets"), py::arg("elements"), py::arg("sums"), py::arg("policy_error_out"),
          py::arg("ref_error_out"), py::arg("error_delta_out"));
  py::class_<PairErrorsGrad>(module, "PairErrorsGrad", local)
      .def(
          py::init(&errors_grad_of), py::arg("grad_error"), py::arg("policy"), py::arg("target"), py::arg("pairs"),
          py::arg("targets"), py::arg("elements"), py::arg("grad"));
  module.def(
      "noise_pair", &dpo_fast::noise_pair, py::arg("place"), py::arg("latents"), py::arg("signal"), py::arg("sigma"),
      py::arg("seed"), py::arg("pair_id"), py::arg("draw"), py::arg("noisy"), py::arg("target"), py::arg("pairs"),
      py::arg("channels"), py::arg("pixels"), py::arg("channels_last"), py::arg("velocity"));
  module.def("pair_errors", &dpo_fast::pair_errors, py::arg("place"), py::arg("errors"));
  module.def("pair_errors_grad", &dpo_fast::pair_errors_grad, py::arg("place"), py::arg("errors"));
  module.def(
      "dpo_loss", &dpo_fast::dpo_loss, py::arg("place"), py::arg("errors"), py::arg("beta"), py::arg("label"),
      py::arg("weight"), py::arg("loss"), py::arg("margin"));
  module.def(
      "dpo_loss_grad", &dpo_fast::dpo_loss_grad, py::arg("place"), py::arg("errors"), py::arg("grad_loss"),
      py::arg("margin"), py::arg("label"), py::arg("weight"), py::arg("beta"));
  module.def("pair_sums_floats", &dpo_fast::pair_sums_floats, py::arg("place"), py::arg("images"), py::arg("elements"));
  module.def("cuda_fault", &cuda::fault, py::arg("device"));
  module.attr("cuda_cubins") = DPO_FAST_CUBINS;  // compute capabilities with native code, "80,90a"; "" without CUDA
  module.attr("cuda_ptx") = DPO_FAST_PTX;        // the one whose PTX is included, "90"
  module.def(
      "philox", &philox_words, "For tests: the generator's four words of a counter's four and a key's two.");
  module.def(
      "exponentials", &exponentials, "For tests: e^x of `count` float32 at the first address, to the second.",
      py::arg("x"), py::arg("y"), py::arg("count"));
}
