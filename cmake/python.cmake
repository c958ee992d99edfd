# fusedmerge._ext, when pip builds (scikit-build-core sets SKBUILD).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module ${SKBUILD_SABI_COMPONENT})
find_package(nanobind CONFIG REQUIRED)
nanobind_add_module(_ext STABLE_ABI NB_STATIC python/bindings.cpp)
target_link_libraries(_ext PRIVATE fusedmerge_merge_cpu)
install(TARGETS _ext LIBRARY DESTINATION fusedmerge)
