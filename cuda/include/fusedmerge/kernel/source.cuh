// Where x comes from: as it is, from the residual stream through RMSNorm, or SiLU(gate) * up. Roundings are those of a model in 16 bits
// that stores each of its steps (SourceKind), so that a fused layer's x has the bits of an unfused one's, but for float32's last place.
#pragma once

#include "products.cuh"

namespace fusedmerge {

template <class T>
struct Source {
    const LinearParams& params;
    const float* scales;  // [T] of the norm, in shared memory

    // values := values rounded to T.
    FM_DEVICE static void round(float (&values)[8]) {
        Octet<T> octet;
        narrow_octet(octet, values);
        widen_octet(values, octet, 1.0f);
    }

    FM_DEVICE void load_values(float (&values)[8], const void* from, int col, int flag) const {
        Octet<T> octet;
        load_octet(octet, static_cast<const T*>(from) + col, params.cols - col, (params.flags & flag) != 0);
        widen_octet(values, octet, 1.0f);
    }

    FM_DEVICE const void* row(const void* first, long long stride, int token) const {
        return static_cast<const T*>(first) + token * stride;
    }

    // The norm's operand: what `sum` is to hold.
    FM_DEVICE void load_sum(float (&values)[8], int token, int col) const {
        load_values(values, row(params.input, params.input_stride, token), col, kInputAligned);
        if (params.second == nullptr) return;
        float second[8];
        load_values(second, row(params.second, params.second_stride, token), col, kSecondAligned);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = add(values[i], second[i]);
        round(values);
    }

    FM_DEVICE void load_normed(float (&values)[8], int token, int col) const {
        load_sum(values, token, col);
        float weight[8];
        load_values(weight, params.norm_weight, col, kNormAligned);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], scales[token]);
        round(values);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], weight[i]);
    }

    FM_DEVICE void load_silu(float (&values)[8], int token, int col) const {
        load_values(values, row(params.input, params.input_stride, token), col, kInputAligned);
        float up[8];
        load_values(up, row(params.second, params.second_stride, token), col, kSecondAligned);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = divide(values[i], add(1.0f, exponential(-values[i])));
        round(values);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], up[i]);
    }

    // Eight columns of a token's x.
    FM_DEVICE void load(Octet<T>& octet, int token, int col) const {
        if (params.source == kSourcePlain) {
            const T* from = static_cast<const T*>(row(params.input, params.input_stride, token));
            load_octet(octet, from + col, params.cols - col, (params.flags & kInputAligned) != 0);
            return;
        }
        float values[8];
        if (params.source == kSourceNorm) {
            load_normed(values, token, col);
        } else {
            load_silu(values, token, col);
        }
        narrow_octet(octet, values);
    }
};

}  // namespace fusedmerge
