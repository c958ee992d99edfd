# fusedmerge_host (planner, C API) and fusedmerge_launch (kernels, or what says that there are none): compiled once, for whatever links them.
add_library(fusedmerge_host OBJECT cuda/src/api.cpp cuda/src/plan.cpp)
add_library(fusedmerge_launch OBJECT)
if(fusedmerge_with_cuda)
  target_sources(fusedmerge_launch PRIVATE cuda/src/launch.cu cuda/src/launch_kernel.cu cuda/src/instances.cu cuda/src/kernels.cpp
                                           cuda/src/kernels_linear.cu cuda/src/kernels_sgmv.cu)
  target_link_libraries(fusedmerge_launch PRIVATE CUDA::cudart_static)
  target_compile_options(fusedmerge_launch PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=0>) # one architecture each
else()
  target_sources(fusedmerge_launch PRIVATE cuda/src/launch_none.cpp)
endif()
foreach(objects fusedmerge_host fusedmerge_launch)
  target_include_directories(${objects} PRIVATE cuda/include cuda/src)
  set_target_properties(
    ${objects} PROPERTIES CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_compile_options(
    ${objects} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
endforeach()
