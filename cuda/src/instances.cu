// Every instantiation of the switch that the ahead-of-time library contains, as one table.
#include "fusedmerge/kernel/switch.cuh"
#include "instances.h"
#include "plan.h"

static_assert(fusedmerge::kSwitchSharedBytes<fusedmerge::Bf16> == fusedmerge::kMmaSharedBytes, "plan.h states another size");
static_assert(fusedmerge::kResidentExtraBytes == fusedmerge::kMmaResidentExtraBytes, "plan.h states another size");
static_assert(fusedmerge::kSwitchSharedBytes<float> == fusedmerge::kSimtSharedBytes, "plan.h states another size");

namespace fusedmerge {
namespace {

template <class T>
constexpr Number number_of() {
    return kSame<T, Bf16> ? Number::kBf16 : kSame<T, Fp16> ? Number::kFp16 : kSame<T, float> ? Number::kFloat32 : Number::kFp8E4M3;
}

template <class Live, class Source, class Factor>
SwitchInstance instance() {
    return {number_of<Live>(), number_of<Source>(), number_of<Factor>(),
            reinterpret_cast<const void*>(&switch_kernel<Live, Source, Factor>), kSwitchSharedBytes<Factor>};
}

const SwitchInstance kSwitchInstances[] = {
    instance<Bf16, Bf16, Bf16>(),   instance<Bf16, float, Bf16>(),     instance<Bf16, Fp8E4M3, Bf16>(),  //
    instance<Fp16, Fp16, Fp16>(),   instance<Fp16, float, Fp16>(),     instance<Fp16, Fp8E4M3, Fp16>(),  //
    instance<Bf16, Bf16, float>(),  instance<Bf16, float, float>(),    instance<Bf16, Fp8E4M3, float>(), instance<Fp16, Fp16, float>(),
    instance<Fp16, float, float>(), instance<Fp16, Fp8E4M3, float>(),  instance<float, float, float>(),  instance<float, Bf16, float>(),
    instance<float, Fp16, float>(), instance<float, Fp8E4M3, float>(),
};

}  // namespace

const SwitchInstance* find_switch_instance(Number live, Number source, Number factor) {
    for (const SwitchInstance& candidate : kSwitchInstances) {
        if (candidate.live == live && candidate.source == source && candidate.factor == factor) return &candidate;
    }
    return nullptr;
}

}  // namespace fusedmerge
