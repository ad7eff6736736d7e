// What the measurements share: C entry points that give nullptr, or the words of what went wrong, valid until the next call.
#pragma once

#include <exception>
#include <string>

#include "device.h"

#define CALIBRATION_ENTRY extern "C" __attribute__((visibility("default"))) const char*

namespace llama4_kernels::calibration {

template <class Body>
const char* guarded(Body body) {
    static thread_local std::string message;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace llama4_kernels::calibration
