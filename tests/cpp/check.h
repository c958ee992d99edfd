// The smallest test kit that says what failed: CHECK, and CHECK_FAILS for a refused call and its message.
#pragma once

#include <cstdio>
#include <cstring>

#include "fusedmerge/fusedmerge.h"

inline int num_failures = 0;

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            ++num_failures;                                                              \
        }                                                                                \
    } while (false)

#define CHECK_OK(call)                                                                                                         \
    do {                                                                                                                       \
        fusedmerge_result got = (call);                                                                                        \
        if (got != FUSEDMERGE_OK) {                                                                                            \
            std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, fusedmerge_result_name(got), fusedmerge_last_error()); \
            ++num_failures;                                                                                                    \
        }                                                                                                                      \
    } while (false)

// The message names the operation, and has `part` in it.
#define CHECK_FAILS(call, expected, operation, part)                                                                                    \
    do {                                                                                                                                \
        fusedmerge_result got = (call);                                                                                                 \
        const char* said = fusedmerge_last_error();                                                                                     \
        if (got != (expected) || std::strncmp(said, operation, std::strlen(operation)) != 0 || std::strstr(said, part) == nullptr) {    \
            std::fprintf(stderr, "%s:%d: expected %s and \"%s ... %s\", got %s and \"%s\"\n", __FILE__, __LINE__, #expected, operation, \
                         part, fusedmerge_result_name(got), said);                                                                      \
            ++num_failures;                                                                                                             \
        }                                                                                                                               \
    } while (false)
