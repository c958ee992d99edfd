// What PTX instructions do that touch no memory.
#include <cfenv>
#include <cmath>
#include <stdexcept>

#include "ptx_machine.h"

namespace fusedmerge::ptx {
namespace {

// Calls `use` with a value of the PTX type's C++ type. Predicates are bytes of 0 and 1.
template <class Use>
bool with_type(const std::string& name, Use use) {
    if (name == "u8" || name == "b8" || name == "pred") return use(uint8_t{}), true;
    if (name == "u16" || name == "b16") return use(uint16_t{}), true;
    if (name == "u32" || name == "b32") return use(uint32_t{}), true;
    if (name == "u64" || name == "b64") return use(uint64_t{}), true;
    if (name == "s8") return use(int8_t{}), true;
    if (name == "s16") return use(int16_t{}), true;
    if (name == "s32") return use(int32_t{}), true;
    if (name == "s64") return use(int64_t{}), true;
    if (name == "f32") return use(float{}), true;
    return false;
}

// destination = f(sources), lane by lane.
template <class To, class From, class F>
Action unary(F f) {
    return [f](Step& step) {
        Row &to = step.row(0), &from = step.row(1);
        for_lanes(step.mask, [&](int lane) { set<To>(to, lane, static_cast<To>(f(get<From>(from, lane)))); });
    };
}

template <class To, class From, class Second, class F>
Action binary(F f) {
    return [f](Step& step) {
        Row &to = step.row(0), &x = step.row(1), &y = step.row(2);
        for_lanes(step.mask, [&](int lane) { set<To>(to, lane, static_cast<To>(f(get<From>(x, lane), get<Second>(y, lane)))); });
    };
}

template <class To, class From, class F>
Action ternary(F f) {
    return [f](Step& step) {
        Row &to = step.row(0), &x = step.row(1), &y = step.row(2), &z = step.row(3);
        for_lanes(step.mask,
                  [&](int lane) { set<To>(to, lane, static_cast<To>(f(get<From>(x, lane), get<From>(y, lane), get<To>(z, lane)))); });
    };
}

template <class T>
Action compare(const std::string& how) {
    // An unordered comparison ("neu", "leu", ...) is true of NaN, as != is in C++; the others are false.
    if (how == "eq") return binary<uint8_t, T, T>([](T x, T y) { return x == y; });
    if (how == "ne" || how == "neu") {
        return binary<uint8_t, T, T>([how](T x, T y) { return x != y && (how == "neu" || (x == x && y == y)); });
    }
    if (how == "lt") return binary<uint8_t, T, T>([](T x, T y) { return x < y; });
    if (how == "le") return binary<uint8_t, T, T>([](T x, T y) { return x <= y; });
    if (how == "gt") return binary<uint8_t, T, T>([](T x, T y) { return x > y; });
    if (how == "ge") return binary<uint8_t, T, T>([](T x, T y) { return x >= y; });
    if (how == "ltu") return binary<uint8_t, T, T>([](T x, T y) { return !(x >= y); });
    if (how == "leu") return binary<uint8_t, T, T>([](T x, T y) { return !(x > y); });
    if (how == "gtu") return binary<uint8_t, T, T>([](T x, T y) { return !(x <= y); });
    if (how == "geu") return binary<uint8_t, T, T>([](T x, T y) { return !(x < y); });
    return nullptr;
}

float rounded_down(float x, float y, float z) {
    std::fesetround(FE_DOWNWARD);
    volatile float a = x;
    float result = std::fmaf(a, y, z);
    volatile float kept = result;
    std::fesetround(FE_TONEAREST);
    return kept;
}

template <class T>
Action floating(const std::string& name, const std::string& how) {
    const bool nearest = how.empty() || how == "rn";
    if (name == "add" && nearest) return binary<T, T, T>([](T x, T y) { return x + y; });
    if (name == "sub" && nearest) return binary<T, T, T>([](T x, T y) { return x - y; });
    if (name == "mul" && nearest) return binary<T, T, T>([](T x, T y) { return x * y; });
    if (name == "div" && how == "rn") return binary<T, T, T>([](T x, T y) { return x / y; });
    if (name == "sqrt" && how == "rn") return unary<T, T>([](T x) { return std::sqrt(x); });
    if (name == "neg" && how.empty()) return unary<uint32_t, uint32_t>([](uint32_t x) { return x ^ 0x80000000u; });
    if (name == "abs" && how.empty()) return unary<uint32_t, uint32_t>([](uint32_t x) { return x & 0x7fffffffu; });
    if (name == "ex2" && how == "approx.ftz") return unary<T, T>([](T x) { return std::fabs(x) < 0x1p-126f ? 1.0f : std::exp2(x); });
    if (name == "fma" && how == "rn") return ternary<T, T>([](T x, T y, T z) { return std::fmaf(x, y, z); });
    if (name == "fma" && how == "rm") return ternary<T, T>(rounded_down);
    return nullptr;
}

// Overflow wraps: sums and products are formed without a sign.
template <class T>
Action integral(const std::string& name, const std::string& how, bool is_predicate) {
    using U = std::make_unsigned_t<T>;
    using Wide = std::conditional_t<sizeof(T) == 8, T, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    constexpr unsigned kBits = sizeof(T) * 8;
    auto product = [](T x, T y) { return static_cast<T>(static_cast<uint64_t>(x) * static_cast<uint64_t>(y)); };
    if (name == "add" && how.empty())
        return binary<T, T, T>([](T x, T y) { return static_cast<T>(static_cast<U>(x) + static_cast<U>(y)); });
    if (name == "sub" && how.empty())
        return binary<T, T, T>([](T x, T y) { return static_cast<T>(static_cast<U>(x) - static_cast<U>(y)); });
    if (name == "mul" && how == "lo") return binary<T, T, T>(product);
    if (name == "mad" && how == "lo") {
        return ternary<T, T>([product](T x, T y, T z) { return static_cast<T>(static_cast<U>(product(x, y)) + static_cast<U>(z)); });
    }
    if (name == "mul" && how == "wide") {
        if (sizeof(T) == 2) return binary<uint32_t, T, T>([](T x, T y) { return static_cast<uint32_t>(static_cast<int64_t>(x) * y); });
        return binary<Wide, T, T>([](T x, T y) { return static_cast<Wide>(x) * static_cast<Wide>(y); });
    }
    if (!how.empty()) return nullptr;
    if (name == "div") return binary<T, T, T>([](T x, T y) { return y == 0 ? T(~T(0)) : static_cast<T>(x / y); });
    if (name == "rem") return binary<T, T, T>([](T x, T y) { return y == 0 ? x : static_cast<T>(x % y); });
    if (name == "min") return binary<T, T, T>([](T x, T y) { return x < y ? x : y; });
    if (name == "max") return binary<T, T, T>([](T x, T y) { return x > y ? x : y; });
    if (name == "neg") return unary<T, T>([](T x) { return static_cast<T>(U(0) - static_cast<U>(x)); });
    if (name == "and") return binary<T, T, T>([](T x, T y) { return x & y; });
    if (name == "or") return binary<T, T, T>([](T x, T y) { return x | y; });
    if (name == "xor") return binary<T, T, T>([](T x, T y) { return x ^ y; });
    if (name == "not" && is_predicate) return unary<T, T>([](T x) { return !x; });
    if (name == "not") return unary<T, T>([](T x) { return ~x; });
    if (name == "popc") return unary<T, T>([](T x) { return static_cast<T>(__builtin_popcountll(static_cast<U>(x))); });
    if (name == "shl")
        return binary<T, T, uint32_t>([](T x, uint32_t n) { return n >= kBits ? T(0) : static_cast<T>(static_cast<U>(x) << n); });
    if (name == "shr") {
        return binary<T, T, uint32_t>([](T x, uint32_t n) {
            if (n < kBits) return static_cast<T>(x >> n);
            return std::is_signed_v<T> ? static_cast<T>(x >> (kBits - 1)) : T(0);
        });
    }
    return nullptr;
}

// An e4m3 value as fp16, exactly.
uint32_t half_of_fp8(uint32_t bits) {
    uint32_t sign = (bits & 0x80u) << 8, rest = bits & 0x7fu;
    if (rest == 0x7fu) return 0x7fffu;
    float value = rest < 8 ? static_cast<float>(rest) * 0x1p-9f
                           : std::ldexp(1.0f + static_cast<float>(rest & 7u) / 8.0f, static_cast<int>(rest >> 3) - 7);
    return sign | sim::float_to_fp16(value);
}

Action convert(const std::vector<std::string>& parts) {
    const std::string &to = parts[parts.size() - 2], &from = parts.back();
    const bool nearest = parts.size() == 4 && parts[1] == "rn", exact = parts.size() == 3;
    if (to == "f16x2" && from == "e4m3x2" && nearest) {
        return unary<uint32_t, uint16_t>([](uint16_t x) { return half_of_fp8(x & 255u) | half_of_fp8(x >> 8) << 16; });
    }
    if (to == "bf16x2" || to == "f16x2") {  // the first source becomes the high half
        auto narrow = to == "bf16x2" ? sim::float_to_bf16 : sim::float_to_fp16;
        if (!nearest || from != "f32") return nullptr;
        return binary<uint32_t, float, float>(
            [narrow](float high, float low) { return static_cast<uint32_t>(narrow(high)) << 16 | narrow(low); });
    }
    if (to == "f32" && from == "f32" && parts.size() == 4 && parts[1] == "sat") {
        return unary<float, float>([](float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; });  // NaN becomes 0
    }
    if (to == "f32" && from == "f16" && exact) return unary<float, uint16_t>([](uint16_t x) { return sim::fp16_to_float(x); });
    Action action;
    with_type(to, [&](auto t) {
        with_type(from, [&](auto f) {
            using To = decltype(t);
            using From = decltype(f);
            if constexpr (std::is_integral_v<From> && (std::is_integral_v<To> || std::is_same_v<To, float>)) {
                if (std::is_integral_v<To> ? exact : nearest) action = unary<To, From>([](From x) { return static_cast<To>(x); });
            }
        });
    });
    return action;
}

// Between one register and a vector of narrower ones, too.
Action move(size_t num_operands, unsigned bits) {
    if (num_operands == 2) {
        const uint64_t kept = bits == 1 ? 1 : ~uint64_t{0};  // a predicate is 0 or 1
        return [kept](Step& step) { for_lanes(step.mask, [&](int lane) { step.row(0).lane[lane] = step.row(1).lane[lane] & kept; }); };
    }
    if (num_operands != 3 || bits < 32) return nullptr;
    unsigned half = bits / 2;
    uint64_t low = (uint64_t{1} << half) - 1;
    return [half, low, bits](Step& step) {
        bool unpacks = step.instruction.text.find('{') < step.instruction.text.find(',');
        for_lanes(step.mask, [&](int lane) {
            if (unpacks) {
                uint64_t value = step.row(2).lane[lane];
                step.row(0).lane[lane] = value & low;
                step.row(1).lane[lane] = value >> half & low;
            } else {
                step.row(0).lane[lane] = (step.row(1).lane[lane] & low) | (step.row(2).lane[lane] & low) << half;
            }
        });
    };
}

Action select() {
    return [](Step& step) {
        Row &to = step.row(0), &x = step.row(1), &y = step.row(2), &which = step.row(3);
        for_lanes(step.mask, [&](int lane) { to.lane[lane] = which.lane[lane] & 1u ? x.lane[lane] : y.lane[lane]; });
    };
}

void permute(Step& step) {
    for_lanes(step.mask, [&](int lane) {
        uint64_t bytes = get<uint32_t>(step.row(1), lane) | static_cast<uint64_t>(get<uint32_t>(step.row(2), lane)) << 32;
        uint32_t selector = get<uint32_t>(step.row(3), lane), word = 0;
        for (int i = 0; i < 4; ++i) {
            uint32_t pick = selector >> 4 * i & 15u, byte = bytes >> 8 * (pick & 7u) & 255u;
            word |= (pick & 8u ? (byte & 128u ? 255u : 0u) : byte) << 8 * i;
        }
        set(step.row(0), lane, word);
    });
}

// The high word of {high: y, low: x} << n.
void shift_funnel(Step& step) {
    for_lanes(step.mask, [&](int lane) {
        uint64_t both = get<uint32_t>(step.row(1), lane) | static_cast<uint64_t>(get<uint32_t>(step.row(2), lane)) << 32;
        set(step.row(0), lane, static_cast<uint32_t>(both << (get<uint32_t>(step.row(3), lane) & 31u) >> 32));
    });
}

// By way of float32, where products are exact: right wherever the sum is exact, too.
Action fma_pair(bool bf16) {
    auto wide = [bf16](uint32_t bits) { return bf16 ? sim::bits_to_float(bits << 16) : sim::fp16_to_float(static_cast<uint16_t>(bits)); };
    auto narrow = bf16 ? sim::float_to_bf16 : sim::float_to_fp16;
    return ternary<uint32_t, uint32_t>([wide, narrow](uint32_t x, uint32_t y, uint32_t z) {
        uint32_t word = 0;
        for (int shift : {0, 16}) {
            float sum = std::fmaf(wide(x >> shift & 0xffffu), wide(y >> shift & 0xffffu), wide(z >> shift & 0xffffu));
            word |= static_cast<uint32_t>(narrow(sum)) << shift;
        }
        return word;
    });
}

// bfi to, x, y, at, count: y with x's low bits from bit `at` on.
void insert_bits(Step& step) {
    for_lanes(step.mask, [&](int lane) {
        uint32_t at = get<uint32_t>(step.row(3), lane) & 255u, count = get<uint32_t>(step.row(4), lane) & 255u;
        uint64_t mask = at < 32 ? ((uint64_t{1} << (count < 32 ? count : 32)) - 1) << at : 0;
        uint64_t x = at < 32 ? static_cast<uint64_t>(get<uint32_t>(step.row(1), lane)) << at : 0;
        set(step.row(0), lane, static_cast<uint32_t>((x & mask) | (get<uint32_t>(step.row(2), lane) & ~mask)));
    });
}

// shfl.sync.{bfly,idx}.b32 to, from, lane or mask, 0x1f, all
Action shuffle(bool butterfly) {
    return [butterfly](Step& step) {
        Row from = step.row(1), where = step.row(2);
        if (get<uint32_t>(step.row(3), 0) != 0x1f || get<uint32_t>(step.row(4), 0) != 0xffffffffu)
            throw std::runtime_error("a shuffle of some lanes");
        for_lanes(step.mask, [&](int lane) {
            uint32_t other = get<uint32_t>(where, lane);
            set(step.row(0), lane, get<uint32_t>(from, (butterfly ? lane ^ other : other) & 31u));
        });
    };
}

// match.any.sync.b32 to, from, all
void match(Step& step) {
    Row from = step.row(1);
    if (get<uint32_t>(step.row(2), 0) != 0xffffffffu) throw std::runtime_error("a match of some lanes");
    for_lanes(step.mask, [&](int lane) {
        uint32_t equal = 0;
        for_lanes(step.mask,
                  [&](int other) { equal |= static_cast<uint32_t>(get<uint32_t>(from, other) == get<uint32_t>(from, lane)) << other; });
        set(step.row(0), lane, equal);
    });
}

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32 d[4], a[4], b[2], c[4]
Action multiply(bool bf16) {
    return [bf16](Step& step) {
        sim::Warp warp;
        for_lanes(step.mask, [&](int lane) {
            for (int i = 0; i < 4; ++i) warp.a[lane][i] = get<uint32_t>(step.row(4 + i), lane);
            for (int i = 0; i < 2; ++i) warp.b[lane][i] = get<uint32_t>(step.row(8 + i), lane);
            for (int i = 0; i < 4; ++i) warp.c[lane][i] = get<float>(step.row(10 + i), lane);
        });
        sim::multiply_warp(warp, bf16, step.machine.options.tensor_core);
        for_lanes(step.mask, [&](int lane) {
            for (int i = 0; i < 4; ++i) set(step.row(i), lane, warp.c[lane][i]);
        });
    };
}

void vote(Step& step) {
    for_lanes(step.mask, [&](int lane) { step.warp.block->vote |= (step.row(2).lane[lane] & 1u) != 0; });
}

std::vector<std::string> split(const std::string& opcode) {
    std::vector<std::string> parts{""};
    for (char c : opcode) {
        if (c == '.') {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

Action arithmetic(const std::vector<std::string>& parts) {
    std::string how;  // between name and type
    for (size_t i = 1; i + 1 < parts.size(); ++i) how += (how.empty() ? "" : ".") + parts[i];
    Action action;
    with_type(parts.back(), [&](auto type) {
        using T = decltype(type);
        if (parts[0] == "setp") {
            action = compare<T>(how);
        } else if constexpr (std::is_same_v<T, float>) {
            action = floating<T>(parts[0], how);
        } else {
            action = integral<T>(parts[0], how, parts.back() == "pred");
        }
    });
    return action;
}

}  // namespace

void decode(const std::string& opcode, Instruction& instruction) {
    std::vector<std::string> parts = split(opcode);
    const std::string& name = parts[0];
    if (decode_memory(parts, instruction)) return;
    if (opcode == "ret" || opcode == "exit") {
        instruction.kind = Kind::kExit;
        return;
    }
    if (opcode == "bar.sync" || opcode == "bar.red.or.pred") {
        instruction.kind = Kind::kBarrier;
        instruction.target = opcode == "bar.sync" ? 0 : 1;
        instruction.action = vote;
        return;
    }
    if (name == "membar" || name == "createpolicy" || opcode == "prefetch.global.L2" || opcode == "griddepcontrol.launch_dependents") {
        instruction.action = [](Step&) {};
    } else if (opcode == "griddepcontrol.wait") {
        instruction.action = [](Step& step) {
            step.warp.waited |= step.mask;
            sim::reveal();
        };
    } else if (opcode == "bar.warp.sync") {
        instruction.kind = Kind::kTogether;
        instruction.action = [](Step&) {};
    } else if (opcode == "shfl.sync.bfly.b32" || opcode == "shfl.sync.idx.b32") {
        instruction.kind = Kind::kTogether;
        instruction.action = shuffle(parts[2] == "bfly");
    } else if (opcode == "match.any.sync.b32") {
        instruction.kind = Kind::kTogether;
        instruction.action = match;
    } else if (opcode.compare(0, 40, "mma.sync.aligned.m16n8k16.row.col.f32.bf") == 0 ||
               opcode == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") {
        instruction.kind = Kind::kTogether;
        instruction.action = multiply(parts[7] == "bf16");
    } else if (name == "mov") {
        unsigned bits = parts[1] == "b64" ? 64 : parts[1] == "b32" ? 32 : parts[1] == "pred" ? 1 : 0;
        instruction.action = move(instruction.registers.size(), bits);
    } else if (name == "selp") {
        instruction.action = select();
    } else if (opcode == "fma.rn.bf16x2" || opcode == "fma.rn.f16x2") {
        instruction.action = fma_pair(parts[2] == "bf16x2");
    } else if (opcode == "bfi.b32") {
        instruction.action = insert_bits;
    } else if (opcode == "shf.l.wrap.b32") {
        instruction.action = shift_funnel;
    } else if (opcode == "prmt.b32") {
        instruction.action = permute;
    } else if (name == "cvt") {
        instruction.action = convert(parts);
    } else {
        instruction.action = arithmetic(parts);
    }
    if (!instruction.action) throw std::runtime_error("PTX instruction " + opcode);
}

}  // namespace fusedmerge::ptx
