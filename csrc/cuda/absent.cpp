// Replaces the .cu files in a build without CUDA. setup.py defines DPO_FAST_LEFT_OUT, the reason CUDA was left out.
#include <stdexcept>

#include "../ops.h"

namespace dpo_fast::cuda {
namespace {

constexpr char kFault[] = "built without CUDA: " DPO_FAST_LEFT_OUT;

[[noreturn]] void refuse() { throw std::runtime_error(kFault); }

}  // namespace

int64_t pair_sums_floats(int64_t, int64_t) { refuse(); }
void noise_pair(const NoisePair&, Stream) { refuse(); }
void pair_errors(const PairErrors&, Stream) { refuse(); }
void pair_errors_grad(const PairErrorsGrad&, Stream) { refuse(); }
void dpo_loss(const DPOLoss&, Stream) { refuse(); }
void dpo_loss_grad(const DPOLossGrad&, Stream) { refuse(); }
std::string fault(int) { return kFault; }

}  // namespace dpo_fast::cuda
