#include "variants.h"

#if defined(FUSEDMERGE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedmerge {
namespace {

#if defined(FUSEDMERGE_AMX)
// The processor has bfloat16 tiles, and the kernel lets this process use them (it saves their 8 KiB only for processes that ask).
bool has_amx() {
    constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16Tiles) && (edx & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = [] {
        std::vector<Variant> list{{"portable", merge_unit_portable, linear_portable}};
#if defined(FUSEDMERGE_X86)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back({"avx2", merge_unit_avx2, linear_avx2});
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
            list.push_back({"avx512", merge_unit_avx512, linear_avx512});
#if defined(FUSEDMERGE_AVX512BF16)
            if (__builtin_cpu_supports("avx512bf16")) list.push_back({"avx512bf16", merge_unit_avx512, linear_avx512bf16});
#endif
#if defined(FUSEDMERGE_AMX)
            if (has_amx()) list.push_back({"amx", merge_unit_amx, list.back().linear});
#endif
        }
#endif
        return list;
    }();
    return found;
}

const Variant* find_variant(const std::string& name) {
    if (name.empty()) return &variants().back();
    for (const Variant& variant : variants()) {
        if (variant.name == name) return &variant;
    }
    return nullptr;
}

}  // namespace fusedmerge
