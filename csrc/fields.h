// Structs of arguments from Python's keywords. A struct's table has an entry for each of its fields, which says its name once.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <driver_types.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rope.h"

namespace llama4_kernels::fields {

namespace py = pybind11;

// How Python gives a field: an address for a pointer, a number or None for a number that may be absent.
template <class T>
struct Given {
    using Type = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;
    static T value(const Type& given) {
        if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(given);
        else return given;
    }
};
template <>
struct Given<OptionalFloat> {
    using Type = std::optional<float>;
    static OptionalFloat value(const Type& given) { return {given.has_value(), given.value_or(0.0f)}; }
};

// False where the value is of another type.
template <class T>
bool read(py::handle value, T& to) {
    using Type = typename Given<T>::Type;
    py::detail::make_caster<Type> caster;
    if (!caster.load(value, true)) return false;
    to = Given<T>::value(py::detail::cast_op<Type&>(caster));
    return true;
}

template <class Struct>
struct Field {
    PyObject* name;  // interned
    bool (*read)(py::handle, Struct&);
};

template <auto MEMBER>
struct Member;
template <class Struct, class T, T Struct::*MEMBER>
struct Member<MEMBER> {
    static Field<Struct> field(const char* name) {
        return {PyUnicode_InternFromString(name), [](py::handle value, Struct& to) { return read(value, to.*MEMBER); }};
    }
};

// ---- how many fields an aggregate has

struct Anything {
    template <class T>
    operator T() const;
};

template <class Struct, size_t... I>
auto takes(std::index_sequence<I...>) -> decltype(Struct{(void(I), Anything{})...}, std::true_type{});
template <class Struct>
std::false_type takes(...);

template <class Struct, size_t COUNT = 1>
constexpr size_t count() {
    if constexpr (decltype(takes<Struct>(std::make_index_sequence<COUNT + 1>{}))::value) return count<Struct, COUNT + 1>();
    else return COUNT;
}

// ---- all fields of a struct

template <class Struct>
class Table {
public:
    // of: what errors call the struct.
    template <class... Each>
    explicit Table(const char* of, Each... each) : of(of), fields{each...} {
        static_assert(sizeof...(Each) == count<Struct>(), "an entry for each field of the struct");
    }

    // TypeError unless each field is given, and `stream` where the caller wants it, and no other keyword.
    Struct operator()(const py::kwargs& given, cudaStream_t* stream = nullptr) const {
        static PyObject* const stream_name = PyUnicode_InternFromString("stream");
        Struct to{};
        for (const Field<Struct>& field : fields) {
            if (const py::handle value = find(given, field.name); !field.read(value, to)) refuse(field.name, value);
        }
        if (stream) {
            if (const py::handle value = find(given, stream_name); !read(value, *stream)) refuse(stream_name, value);
        }
        if (given.size() > fields.size() + (stream ? 1 : 0)) refuse_unknown(given);
        return to;
    }

private:
    py::handle find(const py::kwargs& given, PyObject* name) const {
        PyObject* value = PyDict_GetItemWithError(given.ptr(), name);
        if (!value) throw py::type_error(of + " lacks " + py::cast<std::string>(name));
        return value;
    }

    [[noreturn]] void refuse(py::handle name, py::handle value) const {
        throw py::type_error(of + ": " + py::cast<std::string>(name) + " cannot be " + py::cast<std::string>(py::repr(value)));
    }

    [[noreturn]] void refuse_unknown(const py::kwargs& given) const {
        for (const auto& item : given) {
            const auto name = py::cast<std::string>(item.first);
            const auto has_name = [&](const Field<Struct>& field) { return py::cast<std::string>(field.name) == name; };
            if (name != "stream" && std::none_of(fields.begin(), fields.end(), has_name)) throw py::type_error(of + " has no " + name);
        }
        throw py::type_error(of + " has no stream");
    }

    std::string of;
    std::vector<Field<Struct>> fields;
};

// A function of the module that launches on a stream.
template <class Arguments, class... Each>
void def_launcher(py::module_& module, const char* name, void (*launcher)(const Arguments&, cudaStream_t), Each... fields) {
    module.def(name, [launcher, table = Table<Arguments>(name, fields...)](const py::kwargs& given) {
        cudaStream_t stream;
        const Arguments arguments = table(given, &stream);
        launcher(arguments, stream);
    });
}

// A class of the module, of which others have fields.
template <class Struct, class... Each>
void def_struct(py::module_& module, const char* name, Each... fields) {
    const auto make = [table = Table<Struct>(name, fields...)](const py::kwargs& given) { return table(given); };
    py::class_<Struct>(module, name, py::module_local()).def(py::init(make));
}

}  // namespace llama4_kernels::fields
