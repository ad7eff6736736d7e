// The host's half of a launch, csrc/device.h and make_tensor_map, over a stand-in for CUDA's runtime and driver that has their rules: what
// a kernel may launch with is what was set for it last, and a thread has no context before the runtime gives it one.

#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "device.h"
#include "hopper/tma.cuh"

using namespace llama4_kernels;

namespace {

std::map<const void*, int> shared_limits;
std::function<void()> after_a_limit_is_set;
thread_local bool has_context = false;

[[maybe_unused]] CUresult current_context(CUcontext* context) {
    *context = has_context ? reinterpret_cast<CUcontext>(1) : nullptr;
    return CUDA_SUCCESS;
}

[[maybe_unused]] CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
    return has_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

void kernel(int) {}

void launch_with(size_t shared_bytes) { launch({"op", dim3(1), dim3(32), shared_bytes, nullptr}, &kernel, 0); }

hopper::TensorMap make_map() {
    alignas(16) static uint8_t data[16 * 128];
    return hopper::make_tensor_map<2>({"tensor", data, hopper::ElementType::uint8, {128, 16}, {128}, {128, 8}, hopper::Swizzle::bytes_128});
}

std::string error;

const char* report(const std::function<void()>& function) {
    error.clear();
    try {
        function();
    } catch (const std::exception& caught) {
        error = caught.what();
    }
    return error.c_str();
}

}  // namespace

// ---- the stand-in; for device code nvcc has some of these of its own

#ifndef __CUDA_ARCH__

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
    shared_limits[function] = value;
    if (const auto then = std::exchange(after_a_limit_is_set, nullptr)) then();
    return value <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    const auto limit = shared_limits.try_emplace(function, 48 << 10).first->second;
    return config->dynamicSmemBytes <= size_t(limit) ? cudaSuccess : cudaErrorInvalidValue;
}

const char* cudaGetErrorName(cudaError_t) { return "an error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the stand-in"; }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
    has_context = true;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
    const std::map<std::string, void*> functions{{"cuCtxGetCurrent", reinterpret_cast<void*>(&current_context)},
                                                 {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&encode)}};
    const auto found = functions.find(name);
    *function = found == functions.end() ? nullptr : found->second;
    return cudaSuccess;
}

extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}

#endif

// ---- what is tried, each gives "" or an error

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT launch_of_less_between_limit_and_launch_of_more(size_t less, size_t more) {
    after_a_limit_is_set = [=] { launch_with(less); };
    return report([=] { launch_with(more); });
}

EXPORT map_in_a_new_thread() {
    const char* result = nullptr;
    std::thread([&] { result = report([] { make_map(); }); }).join();
    return result;
}
