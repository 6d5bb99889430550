// noise_pair on CUDA, in one launch. A Philox block covers four channels of one pixel, so a thread draws complete
// blocks: eight pixels of four planes, two blocks adjacent in memory, or one block stored element by element.
#include "vectors.cuh"

namespace dpo_fast::cuda {
namespace {

__device__ __forceinline__ Normals draw(const NoisePair& op, int64_t pair, int64_t block) {
  return noise_block(
      op.seed, static_cast<uint64_t>(op.pair_id[pair]), static_cast<uint64_t>(op.draw[pair]),
      static_cast<uint32_t>(block));
}

// Applies the noise of the elements from `start` on to both images of a pair.
__device__ __forceinline__ void apply(const NoisePair& op, int64_t pair, int64_t start, const Vector& noise) {
  const int64_t size = op.channels * op.pixels;
  const float signal = op.signal[pair], sigma = op.sigma[pair];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int64_t row = (side * op.pairs + pair) * size;
    const ConstArray latents = at(op.latents, row);
    const MutableArray noisy = at(op.noisy, row);
    const Vector x0 = decode(load(latents, start, size, is_aligned(latents.data)), latents.dtype);
    Vector out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.x[i] = noised(x0.x[i], noise.x[i], signal, sigma);
    store(noisy, start, size, is_aligned(noisy.data), out);
    if (op.velocity) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out.x[i] = velocity_of(x0.x[i], noise.x[i], signal, sigma);
      store({op.target + row, kFloat32}, start, size, is_aligned(op.target + row), out);
    }
  }
  if (!op.velocity) {
    float* target = op.target + pair * size;
    store({target, kFloat32}, start, size, is_aligned(target), noise);
  }
}

// Contiguous, pixels a multiple of 8: each thread draws eight pixels, four channels at a time.
__global__ void __launch_bounds__(kThreads) noise_planes(const NoisePair op) {
  const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (pixel >= op.pixels) return;
  const int64_t groups = (op.channels + 3) / 4;
  for (int64_t pair = blockIdx.y; pair < op.pairs; pair += gridDim.y) {
    for (int64_t group = 0; group < groups; ++group) {
      Vector noise[4];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Normals normals = draw(op, pair, (pixel + i) * groups + group);
#pragma unroll
        for (int k = 0; k < 4; ++k) noise[k].x[i] = normals.z[k];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (4 * group + k < op.channels) apply(op, pair, (4 * group + k) * op.pixels + pixel, noise[k]);
      }
    }
  }
}

// channels_last, channels a multiple of 4: the blocks are consecutive in memory, two per thread.
__global__ void __launch_bounds__(kThreads) noise_pixels(const NoisePair op) {
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (start >= op.channels * op.pixels) return;
  for (int64_t pair = blockIdx.y; pair < op.pairs; pair += gridDim.y) {
    const Normals first = draw(op, pair, start / 4), second = draw(op, pair, start / 4 + 1);
    Vector noise;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      noise.x[k] = first.z[k];
      noise.x[4 + k] = second.z[k];
    }
    apply(op, pair, start, noise);
  }
}

__device__ __forceinline__ float load_one(ConstArray x, int64_t i) {
  if (x.dtype == kFloat32) return static_cast<const float*>(x.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(x.data)[i];
  return x.dtype == kFloat16 ? from_float16(half) : from_bfloat16(half);
}

__device__ __forceinline__ void store_one(MutableArray x, int64_t i, float value) {
  if (x.dtype == kFloat32) {
    static_cast<float*>(x.data)[i] = value;
  } else {
    static_cast<uint16_t*>(x.data)[i] = x.dtype == kFloat16 ? to_float16(value) : to_bfloat16(value);
  }
}

// Any size and memory order: one block per thread.
__global__ void __launch_bounds__(kThreads) noise_elements(const NoisePair op) {
  const int64_t groups = (op.channels + 3) / 4;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= op.pixels * groups) return;
  const int64_t pixel = block / groups, group = block % groups, size = op.channels * op.pixels;
  for (int64_t pair = blockIdx.y; pair < op.pairs; pair += gridDim.y) {
    const Normals normals = draw(op, pair, block);
    const float signal = op.signal[pair], sigma = op.sigma[pair];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t channel = 4 * group + k;
      if (channel >= op.channels) break;
      const int64_t offset = op.channels_last ? pixel * op.channels + channel : channel * op.pixels + pixel;
      for (int64_t row = pair; row < 2 * op.pairs; row += op.pairs) {
        const int64_t i = row * size + offset;
        const float x0 = load_one(op.latents, i);
        store_one(op.noisy, i, noised(x0, normals.z[k], signal, sigma));
        if (op.velocity) op.target[i] = velocity_of(x0, normals.z[k], signal, sigma);
      }
      if (!op.velocity) op.target[pair * size + offset] = normals.z[k];
    }
  }
}

}  // namespace

void preload_noise_pair() { preload(noise_planes, noise_pixels, noise_elements); }

void noise_pair(const NoisePair& op, Stream where) {
  const OnDevice on(where.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  const auto grid = [&](int64_t threads) {
    return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)), grid_rows(op.pairs));
  };
  if (op.channels_last && op.channels % 4 == 0) {
    noise_pixels<<<grid(ceil_div(op.channels * op.pixels, kVector)), kThreads, 0, stream>>>(op);
  } else if (!op.channels_last && op.pixels % kVector == 0) {
    noise_planes<<<grid(op.pixels / kVector), kThreads, 0, stream>>>(op);
  } else {
    noise_elements<<<grid(op.pixels * ceil_div(op.channels, 4)), kThreads, 0, stream>>>(op);
  }
  check(cudaGetLastError());
}

}  // namespace dpo_fast::cuda
