# What others do with the package: install it into a fresh prefix, find it there, build and run.
set(prefix ${CMAKE_CURRENT_BINARY_DIR}/prefix)
add_test(NAME install_clear COMMAND ${CMAKE_COMMAND} -E rm -rf ${prefix})
add_test(NAME install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${prefix})
set_tests_properties(install_clear PROPERTIES FIXTURES_SETUP clear)
set_tests_properties(install PROPERTIES FIXTURES_REQUIRED clear FIXTURES_SETUP prefix)

# A project in `source`, configured against the prefix with the remaining arguments, built from nothing, and its tests run.
function(fusedmerge_add_consumer name source)
  set(binary ${CMAKE_CURRENT_BINARY_DIR}/${name})
  add_test(NAME ${name}_clear COMMAND ${CMAKE_COMMAND} -E rm -rf ${binary})
  add_test(
    NAME ${name}
    COMMAND
      ${CMAKE_CTEST_COMMAND} --build-and-test ${source} ${binary} --build-generator ${CMAKE_GENERATOR} --build-makeprogram
      ${CMAKE_MAKE_PROGRAM} --build-options -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_BUILD_TYPE=Release
      -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DCMAKE_COMPILE_WARNING_AS_ERROR=ON ${ARGN} --test-command ${CMAKE_CTEST_COMMAND}
      --output-on-failure --no-tests=error)
  set_tests_properties(${name}_clear PROPERTIES FIXTURES_SETUP ${name}_clear)
  set_tests_properties(${name} PROPERTIES FIXTURES_REQUIRED "prefix;${name}_clear")
endfunction()

set(consumer ${CMAKE_CURRENT_SOURCE_DIR}/device_consumer)
fusedmerge_add_consumer(example_shared ${PROJECT_SOURCE_DIR}/examples/cpp -DBUILD_SHARED_LIBS=ON)
fusedmerge_add_consumer(example_static ${PROJECT_SOURCE_DIR}/examples/cpp -DBUILD_SHARED_LIBS=OFF)
if(fusedmerge_with_cuda)
  fusedmerge_add_consumer(device_consumer ${consumer} -DEXPECT_CUDA=ON -DCMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER})
  # The same project, built where there is no nvcc.
  set(binary ${CMAKE_CURRENT_BINARY_DIR}/without_nvcc)
  add_test(NAME without_nvcc_clear COMMAND ${CMAKE_COMMAND} -E rm -rf ${binary})
  add_test(
    NAME without_nvcc
    COMMAND
      ${CMAKE_CTEST_COMMAND} --build-and-test ${PROJECT_SOURCE_DIR} ${binary} --build-generator ${CMAKE_GENERATOR} --build-makeprogram
      ${CMAKE_MAKE_PROGRAM} --build-options -DCMAKE_CUDA_COMPILER= -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
      -DCMAKE_COMPILE_WARNING_AS_ERROR=ON --test-command ${CMAKE_CTEST_COMMAND} --output-on-failure --no-tests=error)
  set_tests_properties(without_nvcc_clear PROPERTIES FIXTURES_SETUP without_nvcc_clear)
  set_tests_properties(without_nvcc PROPERTIES FIXTURES_REQUIRED without_nvcc_clear)
else()
  fusedmerge_add_consumer(device_consumer ${consumer} -DEXPECT_CUDA=OFF -DCMAKE_CUDA_COMPILER=)
endif()
