"""Adam's step in one parallel region: are all gradients finite? then update parameters and moments.

Torch's fused kernel enters a region for each tensor, after another pass has looked for gradients that are not
finite. For the 400,000 parameters of a small VAE, on two cores, that takes twice as long as this does. The
source is compiled as Inductor compiles its own, beside the graph of a step; without a compiler torch's
kernels stay.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdamKernel"]

logger = logging.getLogger("pyro_vae")

_SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

extern "C" int64_t adam_step(
    int64_t count, const int64_t* sizes, float* const* parameters, const float* const* gradients,
    float* const* means, float* const* squares, float* steps,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t is_decoupled) {
  int64_t invalid = 0;
  #pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    uint32_t found = 0;
    for (int64_t k = 0; k < count; ++k) {
      const float* gradient = gradients[k];
      const int64_t begin = sizes[k] * thread / threads, end = sizes[k] * (thread + 1) / threads;
      #pragma omp simd reduction(|:found)
      for (int64_t i = begin; i < end; ++i) {
        uint32_t bits;
        std::memcpy(&bits, gradient + i, 4);
        found |= (bits & 0x7f800000u) == 0x7f800000u;  // infinite or NaN, whatever the compiler assumes
      }
    }
    if (found) {
      #pragma omp atomic write
      invalid = 1;
    }
    #pragma omp barrier
    if (!invalid) {
      for (int64_t k = 0; k < count; ++k) {
        const double step = steps[k] + 1.0;
        const float size = lr / (1 - std::pow(beta1, step));
        const float scale = 1 / std::sqrt(1 - std::pow(beta2, step));
        const float old1 = beta1, new1 = 1 - beta1, old2 = beta2, new2 = 1 - beta2, small = eps;
        const float shrink = is_decoupled ? 1 - lr * weight_decay : 1, pull = is_decoupled ? 0 : weight_decay;
        float *parameter = parameters[k], *mean = means[k], *square = squares[k];
        const float* gradient = gradients[k];
        #pragma omp for simd schedule(static) nowait
        for (int64_t i = 0; i < sizes[k]; ++i) {
          const float g = gradient[i] + pull * parameter[i];
          mean[i] = old1 * mean[i] + new1 * g;
          square[i] = old2 * square[i] + new2 * g * g;
          parameter[i] = shrink * parameter[i] - size * mean[i] / (std::sqrt(square[i]) * scale + small);
        }
      }
      #pragma omp barrier
      #pragma omp single
      for (int64_t k = 0; k < count; ++k) steps[k] += 1;
    }
  }
  return invalid;
}
"""
_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")  # which Inductor switches off; for vectors of roots


class AdamKernel:
    r"""Adam's step, or AdamW's.

    With g the gradient, m and v the moments, t the number of the step and λ the decay,

        m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,
        θ ← θ − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε),

    with g + λθ for g, or by AdamW (1 − lr λ) θ for θ.

    Args:
        parameters: K of them, which `supports` holds for, as for the moments.
        moments: m and v of each parameter.
        steps: Number of steps taken for each parameter, float32 (K,).

    Example:
        >>> weight, mean, square, steps = torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(1)
        >>> step = AdamKernel([weight], [[mean], [square]], steps)
        >>> options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        >>> step([torch.tensor([1.0, -2.0, 3.0])], {**options, "decoupled_weight_decay": False})
        True
        >>> weight
        tensor([-0.1000,  0.1000, -0.1000])
    """

    def __init__(self, parameters: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Tensor):
        self.parameters, self.moments, self.steps = parameters, moments, steps
        self.sizes = (ctypes.c_int64 * len(parameters))(*map(Tensor.numel, parameters))

    @staticmethod
    def supports(tensors: Sequence[Tensor]) -> bool:
        """Return whether parameters, moments or gradients are contiguous float32 in the memory of the CPU."""
        return all(
            tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors
        )

    @staticmethod
    def is_available() -> bool:
        """Return whether the source is compiled, or now could be."""
        return _function() is not None

    def __call__(self, gradients: Sequence[Tensor], options: dict[str, Any]) -> bool:
        """Take a step with the options of a group; return False, and take none, if a gradient is not finite.

        Each gradient is contiguous, of the dtype and shape of its parameter.
        """
        function = _function()
        assert function is not None
        pointers = ctypes.c_void_p * len(self.parameters)
        beta1, beta2 = options["betas"]
        return not function(
            len(self.parameters),
            self.sizes,
            # at each step, since parameter.data may be another tensor
            *(pointers(*map(Tensor.data_ptr, each)) for each in (self.parameters, gradients, *self.moments)),
            self.steps.data_ptr(),
            options["lr"],
            beta1,
            beta2,
            options["eps"],
            options["weight_decay"],
            options["decoupled_weight_decay"],
        )


@functools.cache
def _function() -> Callable[..., int] | None:
    """Return the compiled function, from Inductor's cache on disk if it is there; None without a compiler."""
    try:
        from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415 (imports torch's compiler)

        function: Any = CppCodeCache.load(_SOURCE, extra_flags=_FLAGS).adam_step
    except Exception as error:  # as in `compile_graph`, no error type is documented
        reason = (str(error).splitlines() or [""])[0]
        logger.info("Adam runs by torch's kernels: %s: %s", type(error).__name__, reason)
        return None
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 6, *[ctypes.c_double] * 5, ctypes.c_int64]
    return function
