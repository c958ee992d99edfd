// Where modules and tensors are, all in one call: asking each for it from Python takes longer than the rest of a repeated switch.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedmerge {

// The beginning of dlpack.h's DLPackExchangeAPI, the same in all versions 1.x.
struct TensorExchange {
    static constexpr const char* kName = "dlpack_exchange_api";
    uint32_t major, minor;
    void* older;
    void* conversions[3];
    int (*describe)(void* tensor, nanobind::dlpack::dltensor* out);  // shares the tensor's own shape and strides; may be null
};

// False, with a Python error, for what is no tensor or has no address.
inline bool append_place(const TensorExchange& exchange, PyObject* tensor, std::vector<int64_t>& words) {
    nanobind::dlpack::dltensor found{};
    if (exchange.describe(tensor, &found) != 0) return false;
    int64_t kind[2] = {};
    std::memcpy(&kind[0], &found.dtype, sizeof(found.dtype));
    std::memcpy(&kind[1], &found.device, sizeof(found.device));
    words.insert(words.end(), {reinterpret_cast<int64_t>(found.data), static_cast<int64_t>(found.byte_offset), kind[0], kind[1]});
    words.push_back(found.ndim);
    words.insert(words.end(), found.shape, found.shape + found.ndim);
    if (found.strides != nullptr) words.insert(words.end(), found.strides, found.strides + found.ndim);  // null: contiguous
    return true;
}

inline nanobind::object describe_places(nanobind::handle exchange, const nanobind::list& holders, const nanobind::list& names,
                                        size_t num_modules) {
    const auto* api = static_cast<const TensorExchange*>(PyCapsule_GetPointer(exchange.ptr(), TensorExchange::kName));
    if (api == nullptr || api->major != 1 || api->describe == nullptr) {
        PyErr_Clear();
        return nanobind::none();
    }
    std::vector<int64_t> words;
    words.reserve(9 * holders.size());
    for (size_t i = 0; i < holders.size(); ++i) {
        PyObject* member = PyDict_GetItemWithError(nanobind::handle(holders[i]).ptr(), nanobind::handle(names[i]).ptr());
        if (member == nullptr && PyErr_Occurred()) throw nanobind::python_error();
        if (i < num_modules) {
            words.push_back(reinterpret_cast<int64_t>(member));
        } else if (member == nullptr || !append_place(*api, member, words)) {
            PyErr_Clear();
            return nanobind::none();
        }
    }
    return nanobind::bytes(words.data(), words.size() * sizeof(int64_t));
}

}  // namespace fusedmerge
