# fusedmerge::device (the kernels' headers), fusedmerge::shared and fusedmerge::static (libfusedmerge), fusedmerge::fusedmerge (one of them).
file(READ cuda/include/fusedmerge/fusedmerge.h header)
foreach(part MAJOR MINOR PATCH)
  string(REGEX MATCH "#define FUSEDMERGE_VERSION_${part} ([0-9]+)" line "${header}")
  if(NOT CMAKE_MATCH_1 STREQUAL PROJECT_VERSION_${part})
    message(FATAL_ERROR "fusedmerge.h: version: expected ${PROJECT_VERSION} (fusedmerge/__init__.py), got ${part} ${CMAKE_MATCH_1}")
  endif()
endforeach()

include(GNUInstallDirs)

add_library(fusedmerge_device INTERFACE)
add_library(fusedmerge::device ALIAS fusedmerge_device)
set_target_properties(fusedmerge_device PROPERTIES EXPORT_NAME device)
target_compile_features(fusedmerge_device INTERFACE cxx_std_17)
target_include_directories(
  fusedmerge_device INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/cuda/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

foreach(kind shared static)
  string(TOUPPER ${kind} type)
  add_library(fusedmerge_${kind} ${type} $<TARGET_OBJECTS:fusedmerge_host> $<TARGET_OBJECTS:fusedmerge_launch>)
  add_library(fusedmerge::${kind} ALIAS fusedmerge_${kind})
  target_include_directories(
    fusedmerge_${kind} INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/cuda/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  # The interface may change with the minor version while the major one is 0.
  set_target_properties(
    fusedmerge_${kind} PROPERTIES EXPORT_NAME ${kind} OUTPUT_NAME fusedmerge LINKER_LANGUAGE CXX VERSION ${PROJECT_VERSION}
                                  SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  if(fusedmerge_with_cuda)
    target_link_libraries(fusedmerge_${kind} PRIVATE CUDA::cudart_static)
  endif()
endforeach()
target_link_options(fusedmerge_shared PRIVATE -Wl,--exclude-libs,ALL) # the CUDA runtime inside stays inside

if(DEFINED BUILD_SHARED_LIBS AND NOT BUILD_SHARED_LIBS)
  add_library(fusedmerge::fusedmerge ALIAS fusedmerge_static)
else()
  add_library(fusedmerge::fusedmerge ALIAS fusedmerge_shared)
endif()
