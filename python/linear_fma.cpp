// Prologue, GEMV and router on the CPU; compiled once per instruction set, with FUSEDMERGE_LINEAR naming the entry points.
#include <vector>

#include "linear_add.h"
#include "linear_choose.h"
#include "linear_cpu.h"
#include "linear_parts.h"

namespace fusedmerge {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostTokens = 4;  // beside two rows; 32 registers
#else
constexpr int kMostTokens = 2;
#endif

// ---------------------------------------------------------------------- router

template <class Fmt>
void route(const RouteParams& params, int tokens, int threads) {
    const int64_t pitch = pad(params.cols), num_floats = pitch + params.num_adapters;
    const Floats memory(threads * num_floats);
    for_each(tokens, 2LL * tokens * params.num_adapters * params.cols, threads, [&](int64_t t, int worker) {
        float* x = memory.get() + worker * num_floats;
        float* logits = x + pitch;
        const bool is_real = params.mask == nullptr || params.mask[t] != 0;
        widen_padded<Fmt>(x, static_cast<const typename Fmt::Bits*>(params.x) + t * params.x_stride, params.cols);
        for (int n = 0; is_real && n < params.num_adapters; ++n) {
            logits[n] = logit<Fmt>(params.router, params.router_stride, n, params.flags, x, params.cols);
        }
        choose(params.ids + t * params.num_slots, params.gates + t * params.num_slots, logits, is_real ? params.num_adapters : 0,
               params.num_slots, params.normalize != 0);
    });
}

// ---------------------------------------------------------------------- prologue

// x of one token, rounded wherever source.cuh rounds; `second` and `norm` have room for a row.
template <class Fmt>
void make_x(float* x, float* second, const float* norm, const LinearParams& params, int token) {
    using Bits = typename Fmt::Bits;
    const int64_t cols = params.cols;
    widen_padded<Fmt>(x, static_cast<const Bits*>(params.input) + token * params.input_stride, cols);
    if (params.source == kSourcePlain) return;
    if (params.second != nullptr) widen_padded<Fmt>(second, static_cast<const Bits*>(params.second) + token * params.second_stride, cols);
    if (params.source == kSourceNorm) {
        if (params.second != nullptr) each_vector(cols, [&](int64_t i) { store(x + i, rounded<Fmt>(at(x, i) + at(second, i))); });
        if (params.sum != nullptr) narrow_some<Fmt>(static_cast<Bits*>(params.sum) + token * params.sum_stride, x, cols);
        const float mean = dot<Wide>(reinterpret_cast<const Wide::Bits*>(x), x, cols) / static_cast<float>(cols);
        const float scale = 1.0f / std::sqrt(mean + params.epsilon);
        each_vector(cols, [&](int64_t i) { store(x + i, rounded<Fmt>(rounded<Fmt>(at(x, i) * scale) * at(norm, i))); });
    } else {
        for (int64_t i = 0; i < cols; ++i) x[i] = x[i] / (1.0f + std::exp(-x[i]));
        each_vector(cols, [&](int64_t i) { store(x + i, rounded<Fmt>(rounded<Fmt>(at(x, i)) * at(second, i))); });
    }
    narrow_some<Fmt>(static_cast<Bits*>(const_cast<void*>(params.x)) + token * params.x_stride, x, cols);
}

float* z_of(const LinearParams& params, const LinearTarget& target, int token, int j) {
    return target.z + (static_cast<int64_t>(token) * params.num_slots + j) * target.z_pitch;
}

template <class Fmt>
void prologue(const LinearParams& params, int threads) {
    using Bits = typename Fmt::Bits;
    const int64_t cols = params.cols, pitch = pad(cols);
    const Floats memory((params.tokens + 2) * pitch);
    float* x = memory.get();
    float* norm = x + params.tokens * pitch;
    {
        const DefaultFloatEnvironment environment;
        if (params.source == kSourceNorm) widen_padded<Fmt>(norm, static_cast<const Bits*>(params.norm_weight), cols);
        for (int t = 0; t < params.tokens; ++t) make_x<Fmt>(x + t * pitch, norm + pitch, norm, params, t);
    }
    if (params.logits != nullptr) {
        const int64_t num_rows = static_cast<int64_t>(params.num_routings) * params.num_adapters;
        for_each(num_rows, num_rows * cols * 2, threads, [&](int64_t row, int) {
            const int64_t r = row / params.num_adapters, n = row % params.num_adapters;
            for (int t = 0; t < params.tokens; ++t) {
                params.logits[(r * params.tokens + t) * params.num_adapters + n] =
                    logit<Fmt>(params.routers[r], params.router_strides[r], n, params.flags, x + t * pitch, cols);
            }
        });
        const DefaultFloatEnvironment environment;
        for (int64_t i = 0; i < static_cast<int64_t>(params.num_routings) * params.tokens; ++i) {
            choose(params.ids + i * params.num_slots, params.gates + i * params.num_slots, params.logits + i * params.num_adapters,
                   params.num_adapters, params.num_slots, params.normalize != 0);
        }
    }
    int64_t most_ranks = 0, bytes = 0;
    for (int i = 0; i < params.num_targets; ++i) {
        most_ranks = std::max<int64_t>(most_ranks, params.targets[i].rank);
        bytes += params.targets[i].rank * cols * 2 * params.tokens * params.num_slots;
    }
    const int64_t num_tiles = (most_ranks + kUnitRows - 1) / kUnitRows, num_choices = num_tiles * params.tokens * params.num_slots;
    for_each(params.num_targets * num_choices, bytes, threads, [&](int64_t unit, int) {
        const LinearTarget& target = params.targets[unit / num_choices];
        const int place = static_cast<int>(unit % num_choices / num_tiles), token = place / params.num_slots, j = place % params.num_slots;
        const Slot slot = slot_of(params, target, token, j);
        if (slot.gate == 0) return;
        const Bits* a = static_cast<const Bits*>(target.a) + slot.id * target.a_adapter_stride;
        float* z = z_of(params, target, token, j);
        const int64_t stride = target.a_row_stride, row = unit % num_tiles * kUnitRows;
        const int64_t count = std::min<int64_t>(kUnitRows, target.rank - row);  // none or fewer where other targets have more ranks
        shrink<Fmt>(z + row, a + row * stride, stride, x + token * pitch, cols, count);
    });
}

// ---------------------------------------------------------------------- GEMV

template <class Fmt>
class Gemv {
  public:
    explicit Gemv(const LinearParams& params)
        : params_(params), pitch_(pad(params.cols) + 64 / sizeof(Token)), x_(params.tokens * pitch_), z_(num_floats(params)) {
        const DefaultFloatEnvironment environment;
        for (int t = 0; t < params.tokens; ++t) {
            Token* x = x_.get() + t * pitch_;
            const Bits* from = static_cast<const Bits*>(params.x) + t * params.x_stride;
            if constexpr (sizeof(Token) == sizeof(float)) {
                widen_padded<Fmt>(x, from, params.cols);
            } else {
                std::fill_n(std::copy_n(from, params.cols, x), pad(params.cols) - params.cols, Token{});
            }
        }
        float* z = z_.get();
        taken_.reserve(params.num_targets * params.tokens * params.num_slots);
        for (int i = 0; i < params.num_targets; ++i) {
            const LinearTarget& target = params.targets[i];
            for (int t = 0; t < params.tokens; ++t) {
                for (int j = 0; j < params.num_slots; ++j) {
                    const Slot slot = slot_of(params, target, t, j);
                    const float scale = scale_of(target, slot);
                    if (scale == 0) continue;
                    scale_ranks(z, z_of(params, target, t, j), target.rank, scale);
                    taken_.push_back({static_cast<const Bits*>(target.b) + slot.id * target.b_adapter_stride, z});
                    z += pad(target.rank);
                }
                ends_[i][t] = taken_.size();
            }
        }
    }

    // Rows [first, first + count) of y, count at most kUnitRows.
    void run(int target_idx, int64_t first, int64_t count) const {
        const LinearTarget& target = params_.targets[target_idx];
        VFloat sums[kUnitRows][kMaxTokens];
        for (int64_t i = 0; i < count; ++i) std::fill_n(sums[i], params_.tokens, VFloat{});
        float out[kUnitRows], more[kUnitRows + kBlock];
        const Bits* w = static_cast<const Bits*>(target.weight) + first * target.weight_stride;
        size_t begin = target_idx == 0 ? 0 : ends_[target_idx - 1][params_.tokens - 1];
        for (int64_t col = 0; col < params_.cols; col += kChainCols) {
            for_rows(count,
                     [&](auto rows, int64_t i) { add_tokens<rows>(sums[i], w + i * target.weight_stride, target.weight_stride, col); });
        }
        for (int t = 0; t < params_.tokens; ++t) {
            VFloat own[kUnitRows];
            for (int64_t i = 0; i < count; ++i) own[i] = sums[i][t];
            add_taken<Fmt>(own, target, taken_.data() + begin, ends_[target_idx][t] - begin, first, count);
            begin = ends_[target_idx][t];
            sums_of(out, own, count);
            if (target.bias != nullptr) add_more(out, more, static_cast<const Bits*>(target.bias) + first, count);
            if (target.residual != nullptr) {
                add_more(out, more, static_cast<const Bits*>(target.residual) + t * target.residual_stride + first, count);
            }
            narrow_some<Fmt>(static_cast<Bits*>(target.y) + t * target.y_stride + first, out, count);
        }
    }

  private:
    using Bits = typename Fmt::Bits;
    using Token = typename TokenOf<Fmt>::Type;

    static int64_t num_floats(const LinearParams& params) {
        int64_t count = 0;
        for (int i = 0; i < params.num_targets; ++i) count += pad(params.targets[i].rank);
        return count * params.tokens * params.num_slots;
    }

    // sums[i][t] += row i of W times token t, of all tokens, from `col` on: a chain.
    template <int kRows>
    inline void add_tokens(VFloat* sums, const Bits* w, int64_t stride, int64_t col) const {
        constexpr int kFewer = kRows > kTileOfRows / 2 ? kTileOfRows / 2 : kRows;  // with kMostTokens, as many sums as registers hold
        const int64_t count = std::min(kChainCols, params_.cols - col);
        const Token* x = x_.get() + col;
        int t = 0;
        for (; t + kMostTokens <= params_.tokens; t += kMostTokens) {
            for (int i = 0; i < kRows; i += kFewer) {
                add_chain<Fmt, kFewer, kMostTokens>(sums + i * kMaxTokens + t, kMaxTokens, w + i * stride + col, stride, x + t * pitch_,
                                                    pitch_, count);
            }
        }
        for (; t < params_.tokens; ++t) add_chain<Fmt, kRows, 1>(sums + t, kMaxTokens, w + col, stride, x + t * pitch_, pitch_, count);
    }

    static void add_more(float* to, float* wide, const Bits* from, int64_t count) {
        widen_padded<Fmt>(wide, from, count);
        for (int64_t i = 0; i < count; ++i) to[i] += wide[i];
    }

    const LinearParams& params_;
    const int64_t pitch_;  // between tokens: no power of two, or all would lie in the same sets of the cache
    const Array<Token> x_;
    const Floats z_;
    std::vector<Taken<Bits>> taken_;        // target by target, token by token
    size_t ends_[kMaxTargets][kMaxTokens];  // of each token's, in `taken_`
};

template <class Fmt>
void gemv(const LinearParams& params, int threads) {
    const Gemv<Fmt> gemv(params);
    int64_t ends[kMaxTargets], num_units = 0, bytes = 0;  // of each target's units
    for (int i = 0; i < params.num_targets; ++i) {
        ends[i] = num_units += (params.targets[i].rows + kUnitRows - 1) / kUnitRows;
        bytes += static_cast<int64_t>(params.targets[i].rows) * params.cols * 2;
    }
    for_each(num_units, bytes, threads, [&](int64_t unit, int) {
        int i = 0;
        while (unit >= ends[i]) ++i;
        const int64_t first = (unit - (i == 0 ? 0 : ends[i - 1])) * kUnitRows;
        gemv.run(i, first, std::min<int64_t>(kUnitRows, params.targets[i].rows - first));
    });
}

template <class F>
void with_16_bit_format(Dtype dtype, const F& f) {
    dtype == Dtype::kBFloat16 ? f(Format<Dtype::kBFloat16>{}) : f(Format<Dtype::kFloat16>{});
}

}  // namespace

extern const LinearKernels FUSEDMERGE_LINEAR = {
    [](const LinearParams& params, Dtype dtype, int threads) {
        with_16_bit_format(dtype, [&](auto format) { prologue<decltype(format)>(params, threads); });
    },
    [](const LinearParams& params, Dtype dtype, int threads) {
        with_16_bit_format(dtype, [&](auto format) { gemv<decltype(format)>(params, threads); });
    },
    [](const LinearParams& params, Dtype dtype, int threads) {
        with_16_bit_format(dtype, [&](auto format) { add<decltype(format)>(params, threads); });
    },
    [](const RouteParams& params, Dtype dtype, int tokens, int threads) {
        with_16_bit_format(dtype, [&](auto format) { route<decltype(format)>(params, tokens, threads); });
    },
};

}  // namespace fusedmerge
