// Prologue, GEMV and router on the CPU; compiled once per instruction set, with FUSEDMERGE_LINEAR naming the entry points.
#include <atomic>
#include <type_traits>
#include <vector>

#include "linear_choose.h"
#include "linear_cpu.h"
#include "linear_dot.h"
#include "threads.h"

namespace fusedmerge {
namespace {

constexpr int kTileOfRows = 4;
constexpr int kUnitRows = 16;              // of W, or of A: what a thread takes at a time
constexpr int64_t kThreadBytes = 1 << 17;  // of a matrix: less is not worth waking a thread
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostTokens = 4;  // beside two rows; 32 registers
#else
constexpr int kMostTokens = 2;
#endif

// Calls f(i, worker) for every i < count, on up to `threads` threads; `bytes` are read in all.
template <class F>
void for_each(int64_t count, int64_t bytes, int threads, const F& f) {
    const int64_t useful = std::min<int64_t>(count, 1 + bytes / kThreadBytes);
    std::atomic<int64_t> next{0};
    run_on_threads(static_cast<int>(std::min<int64_t>(threads, useful)), [&](int worker) {
        const DefaultFloatEnvironment environment;
        for (int64_t i = next++; i < count; i = next++) f(i, worker);
    });
}

// ---------------------------------------------------------------------- router

template <class Fmt>
void route(const RouteParams& params, int tokens, int threads) {
    const int64_t pitch = pad(params.cols), num_floats = pitch + params.num_adapters;
    const Floats memory(tokens * num_floats);
    for_each(tokens, 2LL * tokens * params.num_adapters * params.cols, threads, [&](int64_t t, int) {
        float* x = memory.get() + t * num_floats;
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

// A slot that a token uses: an id in [0, N), a gate that is not 0.
struct Slot {
    int id;
    float gate;
};

Slot slot_of(const LinearParams& params, const LinearTarget& target, int token, int j) {
    const int64_t place = (static_cast<int64_t>(target.routing) * params.tokens + token) * params.num_slots + j;
    const int id = params.ids[place];
    const bool exists = id >= 0 && id < params.num_adapters && target.rank > 0;
    return {id, exists ? params.gates[place] : 0.0f};
}

float* z_of(const LinearParams& params, const LinearTarget& target, int token, int j) {
    return target.z + (static_cast<int64_t>(token) * params.num_slots + j) * target.z_pitch;
}

// Calls f(rows, first) for tiles of kTileOfRows rows, then for the rows that are left.
template <class F>
inline void for_rows(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kTileOfRows <= count; i += kTileOfRows) f(std::integral_constant<int, kTileOfRows>{}, i);
    for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
}

// z[i] = row i of A times x, i < count.
template <class Fmt>
void shrink(float* z, const typename Fmt::Bits* a, int64_t stride, const float* x, int64_t cols, int64_t count) {
    for (int64_t first = 0; first < count; first += kUnitRows) {
        VFloat sums[kUnitRows] = {};
        const int64_t rows_left = std::min<int64_t>(kUnitRows, count - first);
        for_rows(rows_left, [&](auto rows, int64_t i) { add_rows<Fmt, rows>(sums + i, a + (first + i) * stride, stride, x, cols); });
        sums_of(z + first, sums, rows_left);
    }
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
        const int64_t row = unit % num_tiles * kUnitRows;
        const int64_t stride = target.a_row_stride;
        if (row < target.rank)
            shrink<Fmt>(z + row, a + row * stride, stride, x + token * pitch, cols, std::min<int64_t>(kUnitRows, target.rank - row));
    });
}

// ---------------------------------------------------------------------- GEMV

// B of an adapter that a token takes, and gate scaling z.
template <class Bits>
struct Taken {
    const Bits* b;
    const float* z;  // [pad(r)]
};

// sums[i] += row first + i of B z, of all adapters that a token takes.
template <class Fmt>
inline void add_taken(VFloat* sums, const LinearTarget& target, const Taken<typename Fmt::Bits>* taken, size_t num_taken, int64_t first,
                      int64_t count) {
    const int64_t stride = target.b_row_stride;
    for (size_t j = 0; j < num_taken; ++j) {
        for_rows(count, [&](auto rows, int64_t i) {
            add_rows<Fmt, rows>(sums + i, taken[j].b + (first + i) * stride, stride, taken[j].z, target.rank);
        });
    }
}

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
        for (int i = 0; i < params.num_targets; ++i) {
            const LinearTarget& target = params.targets[i];
            for (int t = 0; t < params.tokens; ++t) {
                for (int j = 0; j < params.num_slots; ++j) {
                    const Slot slot = slot_of(params, target, t, j);
                    const float scale = slot.gate != 0 && target.scaling != nullptr ? slot.gate * target.scaling[slot.id] : slot.gate;
                    if (scale == 0) continue;
                    const float* from = z_of(params, target, t, j);
                    for (int64_t r = 0; r < pad(target.rank); ++r) z[r] = r < target.rank ? scale * from[r] : 0.0f;
                    taken_[i][t].push_back({static_cast<const Bits*>(target.b) + slot.id * target.b_adapter_stride, z});
                    z += pad(target.rank);
                }
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
        for (int64_t col = 0; col < params_.cols; col += kChainCols) {
            for_rows(count,
                     [&](auto rows, int64_t i) { add_tokens<rows>(sums[i], w + i * target.weight_stride, target.weight_stride, col); });
        }
        for (int t = 0; t < params_.tokens; ++t) {
            VFloat own[kUnitRows];
            for (int64_t i = 0; i < count; ++i) own[i] = sums[i][t];
            add_taken<Fmt>(own, target, taken_[target_idx][t].data(), taken_[target_idx][t].size(), first, count);
            sums_of(out, own, count);
            if (target.bias != nullptr) add_row(out, more, static_cast<const Bits*>(target.bias) + first, count);
            if (target.residual != nullptr) {
                add_row(out, more, static_cast<const Bits*>(target.residual) + t * target.residual_stride + first, count);
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

    static void add_row(float* to, float* wide, const Bits* from, int64_t count) {
        widen_padded<Fmt>(wide, from, count);
        for (int64_t i = 0; i < count; ++i) to[i] += wide[i];
    }

    const LinearParams& params_;
    const int64_t pitch_;  // between tokens: no power of two, or all would lie in the same sets of the cache
    const Array<Token> x_;
    const Floats z_;
    std::vector<Taken<Bits>> taken_[kMaxTargets][kMaxTokens];
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

// ---------------------------------------------------------------------- many tokens

// A token's adapters by ascending id, gates of equal ids added: whatever order its slots have, the bits are the same. Returns how many.
int slots_of(Slot (&slots)[kMaxSlots], const LinearParams& params, const LinearTarget& target, int token) {
    int count = 0;
    for (int j = 0; j < params.num_slots; ++j) {
        const Slot slot = slot_of(params, target, token, j);
        if (slot.gate == 0) continue;
        int i = count;
        while (i > 0 && slots[i - 1].id > slot.id) --i;
        if (i > 0 && slots[i - 1].id == slot.id) {
            slots[i - 1].gate += slot.gate;
            continue;
        }
        std::copy_backward(slots + i, slots + count, slots + count + 1);
        slots[i] = slot;
        ++count;
    }
    return count;
}

// y [out] of one token += B z of the adapters that it takes.
template <class Fmt>
void expand(typename Fmt::Bits* y, const LinearTarget& target, const Taken<typename Fmt::Bits>* taken, int num_taken) {
    float out[kUnitRows], more[kUnitRows + kBlock];
    for (int64_t first = 0; first < target.rows; first += kUnitRows) {
        const int64_t count = std::min<int64_t>(kUnitRows, target.rows - first);
        widen_padded<Fmt>(more, y + first, count);
        VFloat sums[kUnitRows] = {};
        add_taken<Fmt>(sums, target, taken, num_taken, first, count);
        sums_of(out, sums, count);
        for (int64_t i = 0; i < count; ++i) out[i] += more[i];
        narrow_some<Fmt>(y + first, out, count);
    }
}

// y += sum of gate scaling B (A x), a token at a time; those with the same first adapter one after another, while it is in the cache.
template <class Fmt>
void add(const LinearParams& params, int threads) {
    using Bits = typename Fmt::Bits;
    constexpr int64_t kUnitTokens = 4;
    const LinearTarget& target = params.targets[0];
    const int64_t pitch = pad(params.cols), z_pitch = pad(target.rank), num_floats = pitch + kMaxSlots * z_pitch;
    const Floats memory(threads * num_floats);
    std::vector<std::pair<int, int>> order;  // (first adapter, token)
    order.reserve(params.tokens);
    Slot slots[kMaxSlots];
    for (int t = 0; t < params.tokens; ++t) {
        if (slots_of(slots, params, target, t) > 0) order.emplace_back(slots[0].id, t);
    }
    std::sort(order.begin(), order.end());
    const int64_t num_tokens = static_cast<int64_t>(order.size()), bytes = 2LL * num_tokens * target.rank * (params.cols + target.rows);
    for_each((num_tokens + kUnitTokens - 1) / kUnitTokens, bytes, threads, [&](int64_t unit, int worker) {
        float* x = memory.get() + worker * num_floats;
        for (int64_t i = unit * kUnitTokens; i < std::min(num_tokens, (unit + 1) * kUnitTokens); ++i) {
            const int token = order[i].second;
            Slot own[kMaxSlots];
            Taken<Bits> taken[kMaxSlots];
            int num_taken = 0;
            widen_padded<Fmt>(x, static_cast<const Bits*>(params.x) + token * params.x_stride, params.cols);
            for (int j = 0, count = slots_of(own, params, target, token); j < count; ++j) {
                const float scale = target.scaling != nullptr ? own[j].gate * target.scaling[own[j].id] : own[j].gate;
                if (scale == 0) continue;
                float* z = x + pitch + num_taken * z_pitch;
                const Bits* a = static_cast<const Bits*>(target.a) + own[j].id * target.a_adapter_stride;
                shrink<Fmt>(z, a, target.a_row_stride, x, params.cols, target.rank);
                for (int64_t r = 0; r < z_pitch; ++r) z[r] = r < target.rank ? scale * z[r] : 0.0f;
                taken[num_taken++] = {static_cast<const Bits*>(target.b) + own[j].id * target.b_adapter_stride, z};
            }
            if (num_taken > 0) expand<Fmt>(static_cast<Bits*>(target.y) + token * target.y_stride, target, taken, num_taken);
        }
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
