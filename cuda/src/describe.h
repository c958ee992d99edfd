// The structs that Python mirrors (fusedmerge/backend/params.py), in words that both sides can be compared in.
#pragma once

#include <string>

// Appends "Struct.field offset size\n" to the std::string `text`.
#define FM_FIELD(type, field) \
    text += #type "." #field " " + std::to_string(offsetof(type, field)) + " " + std::to_string(sizeof(type::field)) + "\n"

namespace fusedmerge {

// Every field of what the kernels and the planner read.
std::string describe_structs();

}  // namespace fusedmerge
