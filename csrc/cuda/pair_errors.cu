// pair_errors on CUDA: a deterministic reduction in two launches, and a backward in one.
#include "pair_errors.cuh"

namespace dpo_fast::cuda {
namespace {

// Returns the sum over a thread block to its first thread; always adds in the same order.
__device__ __forceinline__ float block_sum(float x, float* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  __syncthreads();  // the sum before this one is read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) total += shared[warp];
  }
  return total;
}

__global__ void __launch_bounds__(kThreads) sum_images(const PairErrors op, const int64_t parts) {
  __shared__ float shared[kThreads / 32];
  const int64_t images = 2 * op.pairs, part = blockIdx.x;
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) {
    const ConstArray policy = at(op.policy, image * op.elements);
    const ConstArray target = at(op.target, (image < op.targets ? image : image - op.targets) * op.elements);
    const ConstArray ref = op.ref.data ? at(op.ref, image * op.elements) : target;  // a stand-in: its sums are not used
    float policy_sum = 0, ref_sum = 0, delta_sum = 0;
    for (int64_t start = part * kTile + threadIdx.x * kVector; start < op.elements; start += parts * kTile) {
      const Raw raw_policy = load(policy, start, op.elements, is_aligned(policy.data));
      const Raw raw_ref = load(ref, start, op.elements, is_aligned(ref.data));
      const Raw raw_target = load(target, start, op.elements, is_aligned(target.data));
      const Vector p = decode(raw_policy, policy.dtype), r = decode(raw_ref, ref.dtype);
      const Vector t = decode(raw_target, target.dtype);
#pragma unroll
      for (int i = 0; i < kVector; ++i) add_terms(p.x[i], r.x[i], t.x[i], policy_sum, ref_sum, delta_sum);
    }
    policy_sum = block_sum(policy_sum, shared);
    ref_sum = block_sum(ref_sum, shared);
    delta_sum = block_sum(delta_sum, shared);
    if (threadIdx.x == 0) {
      op.sums[part * images + image] = policy_sum;
      op.sums[(parts + part) * images + image] = ref_sum;
      op.sums[(2 * parts + part) * images + image] = delta_sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_errors(const PairErrors op, const Partition partition) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (image < 2 * op.pairs) finish_image(op, partition, image);
}

__global__ void __launch_bounds__(kThreads) errors_grad(const PairErrorsGrad op, const float mean) {
  scale_residuals(op, [&](int64_t image) { return op.grad_error[image] * mean; });
}

}  // namespace

void preload_pair_errors() { preload(sum_images, finish_errors, errors_grad); }

void launch_sum_images(const PairErrors& op, const Partition& partition, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(partition.parts), grid_rows(2 * op.pairs));
  sum_images<<<grid, kThreads, 0, stream>>>(op, partition.parts);
  check(cudaGetLastError());
}

int64_t pair_sums_floats(int64_t images, int64_t elements) { return 3 * images * Partition(elements).parts; }

void pair_errors(const PairErrors& op, Stream where) {
  const OnDevice on(where.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  const Partition partition(op.elements);
  launch_sum_images(op, partition, stream);
  const unsigned blocks = static_cast<unsigned>(ceil_div(2 * op.pairs, kThreads));
  finish_errors<<<blocks, kThreads, 0, stream>>>(op, partition);
  check(cudaGetLastError());
}

void pair_errors_grad(const PairErrorsGrad& op, Stream where) {
  const OnDevice on(where.device);
  errors_grad<<<residual_grid(op), kThreads, 0, static_cast<cudaStream_t>(where.stream)>>>(op, two_over(op.elements));
  check(cudaGetLastError());
}

std::string fault(int device) {
  int runtime = 0, driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return "no CUDA driver";
  }
  if (driver / 1000 < runtime / 1000) {
    const auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
    return "the driver knows CUDA " + text(driver) + " but the kernels were built with " + text(runtime) +
           ": update the driver, or install dpo_fast again with an older nvcc";
  }
  try {
    const OnDevice on(device);
    preload_noise_pair();
    preload_pair_errors();
    preload_dpo_loss();
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // clears the error, so that the next launch does not report it
    return std::string(error.what()) + "; install dpo_fast again on this machine, or set DPO_FAST_CUDA_ARCHS";
  }
  return "";
}

}  // namespace dpo_fast::cuda
