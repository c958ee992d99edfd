# Headers, libraries, and the package that find_package(fusedmerge) reads.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fusedmerge)
install(DIRECTORY cuda/include/fusedmerge DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS fusedmerge_device fusedmerge_shared fusedmerge_static EXPORT fusedmerge)
install(EXPORT fusedmerge NAMESPACE fusedmerge:: FILE fusedmergeTargets.cmake DESTINATION ${package_dir})

configure_package_config_file(cmake/fusedmergeConfig.cmake.in fusedmergeConfig.cmake INSTALL_DESTINATION ${package_dir}
                              NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(fusedmergeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fusedmergeConfig.cmake ${PROJECT_BINARY_DIR}/fusedmergeConfigVersion.cmake
        DESTINATION ${package_dir})
