# fusedmerge_cpu: the CPU kernels, one object library per instruction set, chosen at run time.
include(CheckCXXCompilerFlag)
find_package(Threads REQUIRED)

if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" OR MSVC)
  message(FATAL_ERROR "fusedmerge: the CPU kernels use vector types of GCC and Clang; got ${CMAKE_CXX_COMPILER_ID}")
endif()

add_library(fusedmerge_cpu STATIC python/merge_cpu.cpp python/threads.cpp python/variants.cpp)
target_include_directories(fusedmerge_cpu PUBLIC python cuda/include)
target_link_libraries(fusedmerge_cpu PUBLIC Threads::Threads)

# A variant: `sources` compiled with further flags, their entry points named after it.
function(fusedmerge_add_variant name sources)
  add_library(fusedmerge_cpu_${name} OBJECT ${sources})
  target_include_directories(fusedmerge_cpu_${name} PRIVATE cuda/include)
  # Fused multiply-adds are wanted; psabi: vectors are passed between inlined functions only.
  target_compile_options(fusedmerge_cpu_${name} PRIVATE ${ARGN} -O3 -ffp-contract=fast -Wno-psabi)
  target_compile_definitions(fusedmerge_cpu_${name} PRIVATE FUSEDMERGE_MERGE_UNIT=merge_unit_${name} FUSEDMERGE_LINEAR=linear_${name})
  target_sources(fusedmerge_cpu PRIVATE $<TARGET_OBJECTS:fusedmerge_cpu_${name}>)
endfunction()

set(fma python/merge_fma.cpp python/linear_fma.cpp)
fusedmerge_add_variant(portable "${fma}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx512 -mavx512f -mavx512bw -mavx512vl -mfma -mf16c)
  fusedmerge_add_variant(avx2 "${fma}" -mavx2 -mfma -mf16c)
  fusedmerge_add_variant(avx512 "${fma}" ${avx512})
  target_compile_definitions(fusedmerge_cpu PRIVATE FUSEDMERGE_X86)

  check_cxx_compiler_flag(-mavx512bf16 FUSEDMERGE_COMPILER_HAS_AVX512BF16)
  if(FUSEDMERGE_COMPILER_HAS_AVX512BF16)
    fusedmerge_add_variant(avx512bf16 python/linear_fma.cpp ${avx512} -mavx512bf16)
    target_compile_definitions(fusedmerge_cpu PRIVATE FUSEDMERGE_AVX512BF16)
  endif()

  check_cxx_compiler_flag("-mamx-tile -mamx-bf16" FUSEDMERGE_COMPILER_HAS_AMX)
  if(FUSEDMERGE_COMPILER_HAS_AMX AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    fusedmerge_add_variant(amx python/merge_amx.cpp ${avx512} -mamx-tile -mamx-bf16)
    target_compile_definitions(fusedmerge_cpu PRIVATE FUSEDMERGE_AMX)
  endif()
endif()
