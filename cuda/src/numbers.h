// The number types of weights and factors, as the host names them. The values are part of the C and Python interfaces.
#pragma once

namespace fusedmerge {

enum class Number { kBf16 = 0, kFp16 = 1, kFloat32 = 2, kFp8E4M3 = 3 };

}  // namespace fusedmerge
