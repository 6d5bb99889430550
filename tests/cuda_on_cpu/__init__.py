"""csrc/cuda on a CPU: what its kernels compute, shown on a machine without a GPU.

Two routes lead from the same .cu files to a build of dpo_fast._native whose CUDA half takes addresses of the host:

source   the text of the .cu files compiled as C++ (include/cuda_runtime.h has CUDA's names)
ptx      what `nvcc -ptx` makes of them, translated to C++ instruction by instruction (ptx.py, ptx_runtime.h)

Both run on the same machine (machine.h): the threads of a block are fibers that run one at a time, in an order drawn
anew between barriers. build.py compiles, emulated.py puts a build in the place of the backend `native`, and
triton_driver.py sends the PTX of Triton's kernels the same way. docs/kernels.md says what this shows and what it
cannot.
"""
