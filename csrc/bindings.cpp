#include <pybind11/pybind11.h>

#include "quantization.h"

namespace py = pybind11;
using namespace llama4_kernels;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Launchers of the CUDA kernels. Tensors are device addresses, streams are CUDA stream handles.";

    py::enum_<Dtype>(module, "Dtype", py::module_local()).value("bfloat16", Dtype::bfloat16).value("float32", Dtype::float32);

    module.def(
        "quantize_per_token",
        [](uintptr_t x, Dtype dtype, int64_t rows, int64_t columns, uintptr_t codes, uintptr_t scale, uintptr_t stream) {
            quantize_per_token(pointer<void>(x), dtype, rows, columns, pointer<uint8_t>(codes), pointer<float>(scale), pointer<CUstream_st>(stream));
        },
        py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("codes"), py::arg("scale"), py::arg("stream"));
}
