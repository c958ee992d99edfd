# fusedmerge._ext and the kernels' headers, when pip builds (scikit-build-core sets SKBUILD).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module ${SKBUILD_SABI_COMPONENT})
find_package(nanobind CONFIG REQUIRED)
nanobind_add_module(_ext STABLE_ABI NB_STATIC python/bindings.cpp cuda/src/describe.cpp $<TARGET_OBJECTS:fusedmerge_host> $<TARGET_OBJECTS:fusedmerge_launch>)
target_include_directories(_ext PRIVATE cuda/include cuda/src)
target_link_libraries(_ext PRIVATE fusedmerge_cpu)
if(fusedmerge_with_cuda)
  target_link_libraries(_ext PRIVATE CUDA::cudart_static)
  target_link_options(_ext PRIVATE -Wl,--exclude-libs,ALL) # the CUDA runtime inside stays inside
endif()
install(TARGETS _ext LIBRARY DESTINATION fusedmerge)
install(DIRECTORY cuda/include/fusedmerge/kernel DESTINATION fusedmerge/include/fusedmerge)
