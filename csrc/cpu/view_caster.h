// A tensor crosses from Python as (pointer, stride, stride, ...) or None; the caller keeps it alive.
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace pybind11::detail {

template <>
struct type_caster<endomamba::View> {
  PYBIND11_TYPE_CASTER(endomamba::View, const_name("Optional[tuple[int, ...]]"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr())) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(source.ptr());
    if (size < 1 || size > 5) return false;
    value.p = static_cast<char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0)));
    for (Py_ssize_t i = 1; i < size; ++i) value.s[i - 1] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }

  static handle cast(const endomamba::View& view, return_value_policy, handle) {
    return make_tuple(reinterpret_cast<std::uintptr_t>(view.p), view.s[0], view.s[1], view.s[2], view.s[3]).release();
  }
};

}  // namespace pybind11::detail
