// The scan's argument structs as Python classes with named fields; endomamba._C and endomamba._C_cuda have their own.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/scan.h"
#include "cpu/view_caster.h"

namespace endomamba {

inline void bind_scan_arguments(pybind11::module_& m) {
  namespace py = pybind11;
#define FIELD(type, name) def_readwrite(#name, &type::name)
  py::class_<ScanDirection>(m, "ScanDirection", py::module_local())
      .def(py::init<>())
      .FIELD(ScanDirection, x)
      .FIELD(ScanDirection, dt)
      .FIELD(ScanDirection, A)
      .FIELD(ScanDirection, B)
      .FIELD(ScanDirection, C)
      .FIELD(ScanDirection, D)
      .FIELD(ScanDirection, dt_bias)
      .FIELD(ScanDirection, initial_state)
      .FIELD(ScanDirection, final_state)
      .FIELD(ScanDirection, chunk_states)
      .FIELD(ScanDirection, reverse)
      .FIELD(ScanDirection, groups_B)
      .FIELD(ScanDirection, groups_C)
      .FIELD(ScanDirection, constant_B)
      .FIELD(ScanDirection, constant_C)
      .FIELD(ScanDirection, dfinal_state)
      .FIELD(ScanDirection, dx)
      .FIELD(ScanDirection, ddt)
      .FIELD(ScanDirection, dB)
      .FIELD(ScanDirection, dC)
      .FIELD(ScanDirection, dA)
      .FIELD(ScanDirection, dD)
      .FIELD(ScanDirection, ddt_bias)
      .FIELD(ScanDirection, dinitial_state);

  py::class_<ScanArgs>(m, "ScanArgs", py::module_local())
      .def(py::init<>())
      .FIELD(ScanArgs, b)
      .FIELD(ScanArgs, l)
      .FIELD(ScanArgs, d)
      .FIELD(ScanArgs, n)
      .FIELD(ScanArgs, frames)
      .FIELD(ScanArgs, cu_seqlens)
      .FIELD(ScanArgs, dtype)
      .FIELD(ScanArgs, out_dtype)
      .FIELD(ScanArgs, threads)
      .FIELD(ScanArgs, softplus)
      .FIELD(ScanArgs, scale)
      .FIELD(ScanArgs, z)
      .FIELD(ScanArgs, y)
      .FIELD(ScanArgs, mask)
      .FIELD(ScanArgs, dy)
      .FIELD(ScanArgs, dz)
      .def("add_direction", [](ScanArgs& a, const ScanDirection& dir) { a.dir[a.directions++] = dir; });
#undef FIELD
}

}  // namespace endomamba
