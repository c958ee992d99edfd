// Python bindings: pointers, strides and streams in, no logic. fusedmerge/backend/native.py builds the CPU merge's tables,
// fusedmerge/backend/params.py the structs whose addresses the planner and the launcher take.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "describe.h"
#include "launch.h"
#include "places.h"
#include "plan.h"
#include "variants.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fusedmerge {
namespace {

constexpr int kSegmentFields = 8;
constexpr int kExpertFields = 6;

template <class T, int kDims>
using Table = nb::ndarray<const T, nb::numpy, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void fail(const std::string& field, const std::string& expected, const std::string& got) {
    throw nb::value_error((field + ": expected " + expected + ", got " + got).c_str());
}

void expect(bool holds, const char* field, const std::string& expected, int64_t got) {
    if (!holds) fail(std::string("merge_cpu: ") + field, expected, std::to_string(got));
}

const Variant& variant_of(const char* operation, const std::string& isa) {
    const Variant* found = find_variant(isa);
    if (found == nullptr) fail(std::string(operation) + ": isa", "one of isas()", isa);
    return *found;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.push_back(variant.name);
    return names;
}

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Dtype dtype(const char* field, int64_t code) {
    expect(code >= 0 && code <= 2, field, "0 (float32), 1 (bfloat16) or 2 (float16)", code);
    return static_cast<Dtype>(code);
}

Expert expert(const int64_t* row, double coefficient, const Segment& s) {
    const Expert e{pointer<const void>(row[0]),     pointer<const void>(row[1]),   row[2], row[3], row[4],
                   static_cast<float>(coefficient), dtype("experts dtype", row[5])};
    expect(e.rank >= 0, "experts rank", "at least 0", e.rank);
    expect(e.rank < 2 || e.a_stride >= s.cols, "experts a_stride", "at least " + std::to_string(s.cols), e.a_stride);
    expect(s.rows < 2 || e.b_stride >= e.rank, "experts b_stride", "at least " + std::to_string(e.rank), e.b_stride);
    return e;
}

Segment segment(const int64_t* row) {
    Segment s{pointer<void>(row[0]), pointer<const void>(row[1]), row[2], row[3], row[4], row[5], dtype("segments dtype", row[6]), {}};
    expect(s.rows >= 0, "segments rows", "at least 0", s.rows);
    expect(s.cols >= 0, "segments cols", "at least 0", s.cols);
    expect(s.rows < 2 || s.live_stride >= s.cols, "segments live_stride", "at least " + std::to_string(s.cols), s.live_stride);
    expect(s.rows < 2 || s.source_stride >= s.cols, "segments source_stride", "at least " + std::to_string(s.cols), s.source_stride);
    return s;
}

using Flag = nb::ndarray<int64_t, nb::numpy, nb::shape<1>, nb::c_contig, nb::device::cpu>;

void merge(const Table<int64_t, 2>& segments, const Table<int64_t, 2>& experts, const Table<double, 1>& coefficients, int threads,
           const std::string& isa, std::optional<Flag> done) {
    expect(segments.shape(1) == kSegmentFields, "segments", "8 columns", segments.shape(1));
    expect(experts.shape(1) == kExpertFields, "experts", "6 columns", experts.shape(1));
    expect(coefficients.shape(0) == experts.shape(0), "coefficients", std::to_string(experts.shape(0)) + " values", coefficients.shape(0));
    expect(threads >= 1, "threads", "at least 1", threads);
    const Variant& variant = variant_of("merge_cpu", isa);

    std::vector<Segment> list;
    list.reserve(segments.shape(0));
    int64_t begin = 0;
    const int64_t num_experts = experts.shape(0);
    for (size_t i = 0; i < segments.shape(0); ++i) {
        const int64_t* row = segments.data() + i * kSegmentFields;
        list.push_back(segment(row));
        const int64_t end = row[7];
        expect(end >= begin && end <= num_experts, "segments experts_end",
               "a value from " + std::to_string(begin) + " to " + std::to_string(num_experts), end);
        for (; begin < end; ++begin) {
            list.back().experts.push_back(expert(experts.data() + begin * kExpertFields, coefficients.data()[begin], list.back()));
        }
    }
    nb::gil_scoped_release release;
    merge_cpu(std::move(list), threads, variant.merge);
    if (done) done->data()[0] = 1;  // before Python runs again: an interrupt that arrives now cannot hide that the weights have changed
}

// The kernels of fused application by the names that the CUDA ones have: prologue_bf16_8, gemv_fp16_16, route_bf16, ...
void linear(const std::string& name, int grid, int64_t params, int threads, const std::string& isa) {
    const LinearKernels& kernels = variant_of("linear_cpu", isa).linear;
    const auto is = [&](const char* kind) { return name.rfind(kind, 0) == 0; };
    if (!is("route_") && !is("prologue_") && !is("gemv_") && !is("add_")) fail("linear_cpu: name", "a kernel's", name);
    const Dtype dtype = name.find("bf16") != std::string::npos ? Dtype::kBFloat16 : Dtype::kFloat16;
    const nb::gil_scoped_release release;
    if (is("route_")) {
        kernels.route(*pointer<const RouteParams>(params), dtype, grid, threads);
    } else {
        const auto run = is("gemv_") ? kernels.gemv : is("add_") ? kernels.add : kernels.prologue;
        run(*pointer<const LinearParams>(params), dtype, threads);
    }
}

constexpr const char* kOperation = "switch";

void check(fusedmerge_result result) {
    if (result != FUSEDMERGE_OK) throw std::runtime_error(fusedmerge_last_error());
}

SwitchLaunch launch_of(const std::tuple<int, int, int>& numbers, int grid, int shared_bytes) {
    auto [live, source, factor] = numbers;
    return {static_cast<Number>(live), static_cast<Number>(source), static_cast<Number>(factor), grid, shared_bytes};
}

bool plan(int64_t request, int64_t segments, int64_t result) {
    return plan_switch(*pointer<const PlanRequest>(request), pointer<SwitchSegment>(segments), *pointer<PlanResult>(result));
}

std::tuple<int, int> query(int ordinal) {
    fusedmerge_device device{};
    check(query_device(kOperation, ordinal, device));
    return {device.num_multiprocessors, device.shared_bytes_per_block};
}

void prepare(const std::tuple<int, int, int>& numbers, int grid, int shared_bytes) {
    check(prepare_switch(kOperation, launch_of(numbers, grid, shared_bytes)));
}

void launch(const std::tuple<int, int, int>& numbers, int grid, int shared_bytes, int64_t params, int64_t stream) {
    const SwitchLaunch launch = launch_of(numbers, grid, shared_bytes);
    check(launch_switch(kOperation, launch, *pointer<const SwitchParams>(params), pointer<CUstream_st>(stream)));
}

bool prepare_named(const std::string& name) {
    bool takes_edge = false;
    check(prepare_kernel(name.c_str(), name.c_str(), takes_edge));
    return takes_edge;
}

void launch_named(const std::string& name, int grid, int shared_bytes, bool programmatic, int64_t params, int params_bytes,
                  int64_t stream) {
    const KernelLaunch launch{name.c_str(), grid, shared_bytes, programmatic};
    check(launch_kernel(name.c_str(), launch, pointer<const void>(params), params_bytes, pointer<CUstream_st>(stream)));
}

void launch_loaded(const std::string& name, int64_t function, int grid, int threads, int shared_bytes, bool programmatic, int64_t params,
                   int64_t stream) {
    const FunctionLaunch launch{pointer<void>(function), grid, threads, shared_bytes, programmatic};
    check(launch_function(name.c_str(), launch, pointer<const void>(params), pointer<CUstream_st>(stream)));
}

}  // namespace
}  // namespace fusedmerge

NB_MODULE(_ext, m) {
    m.doc() = "Compiled kernels of fusedmerge.";
    m.def("isas", &fusedmerge::isas, "Names of the CPU kernel variants that run here, the best one last.");
    m.def("isa", [] { return fusedmerge::variants().back().name; }, "Name of the CPU kernel variant that `merge_cpu` uses by default.");
    m.def("merge_cpu", &fusedmerge::merge, "segments"_a.noconvert(), "experts"_a.noconvert(), "coefficients"_a.noconvert(), "threads"_a,
          nb::kw_only(), "isa"_a = "", "done"_a.noconvert().none() = nb::none(),
          R"(live = round(source + sum_e coefficient_e B_e A_e) for every segment, in one call without the GIL.

segments      int64 [S, 8]: live pointer, source pointer, rows, cols, live row stride, source row stride, dtype, experts end
experts       int64 [E, 6]: a pointer, b pointer, a row stride, b row stride, rank, dtype
coefficients  float64 [E]: gate * scaling
threads       at least 1
isa           one of isas(); "": the best
done          int64 [1], set to 1 after the last write

Segment i owns the experts from segment i - 1's "experts end" to its own. Strides count elements, columns are contiguous; dtype is 0 for
float32, 1 for bfloat16, 2 for float16. a is [rank, cols], b is [rows, rank]. live may be source; no other overlap.
The caller keeps all memory alive. Sums are float32, with one rounding to the weight's dtype; experts of coefficient or rank 0 are
skipped, and a segment without any copies the source's bits. The bits depend on `isa`, not on `threads`.

Raises ValueError for a table that cannot be right, MemoryError if a workspace does not fit; nothing is written then.)");
    m.def("linear_cpu", &fusedmerge::linear, "name"_a, "grid"_a, "params"_a, "threads"_a, "isa"_a = "",
          R"(Run a kernel of fused application (python/linear_cpu.h) on the CPU, without the GIL, from the arguments of its CUDA twin.

name     of a kernel of cuda/src/kernels.h: prologue_<dtype>_<tokens>, gemv_<dtype>_<tokens>, or route_<dtype>; or add_<dtype>, which
         adds the first target's B z to y for any number of tokens
grid     of route: the number of tokens
params   the address of its LinearParams or RouteParams, which point to memory of the CPU

Raises ValueError for another isa, MemoryError if a workspace does not fit; nothing is written then.)");
    m.def("describe_structs", &fusedmerge::describe_structs, R"("Struct.field offset size" lines for what the functions below read.)");
    m.def("describe_places", &fusedmerge::describe_places, "exchange"_a, "holders"_a, "names"_a, "num_modules"_a,
          R"(What is at holders[i][names[i]] now, as bytes that are equal while nothing has moved; None where a tensor is missing.

exchange  torch.Tensor.__dlpack_c_exchange_api__
holders   dicts; the first num_modules hold modules, told by their identity, the rest hold tensors
names     a key for each

A tensor's address, dtype, device, shape and strides are told. None too where `exchange` is no such thing of DLPack 1.x.)");
    m.def("plan_switch", &fusedmerge::plan, "request"_a, "segments"_a, "result"_a,
          "Plan a launch (cuda/src/plan.h) on structs at these addresses. False, with result.error, for what is refused.");
    m.def("has_cuda", &fusedmerge::launch_available,
          "Whether the kernels were compiled in: the functions below raise RuntimeError otherwise.");
    m.def("query_device", &fusedmerge::query, "ordinal"_a, "(multiprocessors, bytes of shared memory that a block may have) of a GPU.");
    m.def("prepare_switch", &fusedmerge::prepare, "numbers"_a, "grid"_a, "shared_bytes"_a,
          "Make the current device's kernel for (live, source, factor) dtypes ready for launches of that size.");
    m.def("launch_switch", &fusedmerge::launch, "numbers"_a, "grid"_a, "shared_bytes"_a, "params"_a, "stream"_a,
          "Launch that kernel on a stream of the current device, with the SwitchParams at an address.");
    m.def("prepare_kernel", &fusedmerge::prepare_named, "name"_a,
          "Let the current device's kernel of this name use all shared memory. True: launches of it may be programmatic.");
    m.def("launch_kernel", &fusedmerge::launch_named, "name"_a, "grid"_a, "shared_bytes"_a, "programmatic"_a, "params"_a, "params_bytes"_a,
          "stream"_a, "Launch the kernel of this name (cuda/src/kernels.h) on a stream of the current device, with params at an address.");
    m.def("launch_function", &fusedmerge::launch_loaded, "name"_a, "function"_a, "grid"_a, "threads"_a, "shared_bytes"_a, "programmatic"_a,
          "params"_a, "stream"_a, "The same for a CUfunction.");
}
