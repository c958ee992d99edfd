# fusedmerge_merge_cpu: the CPU merge, one object library per instruction set, chosen at run time.
include(CheckCXXCompilerFlag)
find_package(Threads REQUIRED)

if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" OR MSVC)
  message(FATAL_ERROR "fusedmerge: the CPU merge uses vector types of GCC and Clang; got ${CMAKE_CXX_COMPILER_ID}")
endif()

add_library(fusedmerge_merge_cpu STATIC python/merge_cpu.cpp)
target_include_directories(fusedmerge_merge_cpu PUBLIC python)
target_link_libraries(fusedmerge_merge_cpu PUBLIC Threads::Threads)

# A variant: `source` compiled with `flags`, its entry point named merge_unit_<name>.
function(fusedmerge_add_variant name source)
  add_library(fusedmerge_merge_${name} OBJECT ${source})
  # Fused multiply-adds are wanted; psabi: vectors are passed between inlined functions only.
  target_compile_options(fusedmerge_merge_${name} PRIVATE ${ARGN} -O3 -ffp-contract=fast -Wno-psabi)
  target_compile_definitions(fusedmerge_merge_${name} PRIVATE FUSEDMERGE_MERGE_UNIT=merge_unit_${name})
  target_sources(fusedmerge_merge_cpu PRIVATE $<TARGET_OBJECTS:fusedmerge_merge_${name}>)
endfunction()

fusedmerge_add_variant(portable python/merge_fma.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx512 -mavx512f -mavx512bw -mavx512vl -mfma -mf16c)
  fusedmerge_add_variant(avx2 python/merge_fma.cpp -mavx2 -mfma -mf16c)
  fusedmerge_add_variant(avx512 python/merge_fma.cpp ${avx512})
  target_compile_definitions(fusedmerge_merge_cpu PRIVATE FUSEDMERGE_X86)

  check_cxx_compiler_flag("-mamx-tile -mamx-bf16" FUSEDMERGE_COMPILER_HAS_AMX)
  if(FUSEDMERGE_COMPILER_HAS_AMX AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    fusedmerge_add_variant(amx python/merge_amx.cpp ${avx512} -mamx-tile -mamx-bf16)
    target_compile_definitions(fusedmerge_merge_cpu PRIVATE FUSEDMERGE_AMX)
  endif()
endif()
