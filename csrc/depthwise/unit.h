// One object file per element type and kernel size, so that they compile side by side. csrc/build.py defines
// FUSED_OPS_SCALAR (0 float32, 1 float16, 2 bfloat16) and, for the convolutions, FUSED_OPS_KERNEL.
#pragma once

#include "../common/scalar.h"

namespace fused_ops {

namespace {

#if FUSED_OPS_SCALAR == 0
using Scalar = float;
#elif FUSED_OPS_SCALAR == 1
using Scalar = float16;
#else
using Scalar = bfloat16;
#endif

}  // namespace

}  // namespace fused_ops
