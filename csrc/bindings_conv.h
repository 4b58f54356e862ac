// The convolution's argument structs as Python classes with named fields; endomamba._C and endomamba._C_cuda have their
// own.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/causal_conv1d.h"
#include "cpu/view_caster.h"

namespace endomamba {

inline void bind_conv_arguments(pybind11::module_& m) {
  namespace py = pybind11;
#define FIELD(type, name) def_readwrite(#name, &type::name)
  py::class_<ConvDirection>(m, "ConvDirection", py::module_local())
      .def(py::init<>())
      .FIELD(ConvDirection, weight)
      .FIELD(ConvDirection, bias)
      .FIELD(ConvDirection, y)
      .FIELD(ConvDirection, dy)
      .FIELD(ConvDirection, dweight)
      .FIELD(ConvDirection, dbias);

  py::class_<ConvArgs>(m, "ConvArgs", py::module_local())
      .def(py::init<>())
      .FIELD(ConvArgs, b)
      .FIELD(ConvArgs, l)
      .FIELD(ConvArgs, d)
      .FIELD(ConvArgs, w)
      .FIELD(ConvArgs, frames)
      .FIELD(ConvArgs, cu_seqlens)
      .FIELD(ConvArgs, dtype)
      .FIELD(ConvArgs, threads)
      .FIELD(ConvArgs, silu)
      .FIELD(ConvArgs, reverse)
      .FIELD(ConvArgs, x)
      .FIELD(ConvArgs, initial_state)
      .FIELD(ConvArgs, final_state)
      .FIELD(ConvArgs, dx)
      .FIELD(ConvArgs, dfinal_state)
      .FIELD(ConvArgs, dinitial_state)
      .def("add_direction", [](ConvArgs& a, const ConvDirection& dir) { a.dir[a.directions++] = dir; });
#undef FIELD
}

}  // namespace endomamba
