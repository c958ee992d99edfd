// M3's host side: many products through the simulator's twin of the tensor core (tests/sim/numbers.cpp).
#include "simulator.h"

// out[i] = the bits of c[i] + sum of a[i, k] b[i, k] over 16 k, in blocks of `depth`, each aligned with `extra_bits`.
extern "C" void twin_products(long long count, const float* c, const float* a, const float* b, int depth, int extra_bits, float* out) {
    for (long long i = 0; i < count; ++i) {
        float sum = c[i];
        for (int k = 0; k < 16; k += depth) {
            sum = fusedmerge::sim::dot_truncated(sum, a + 16 * i + k, b + 16 * i + k, depth, extra_bits);
        }
        out[i] = sum;
    }
}
