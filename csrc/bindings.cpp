// endomamba._C: argument structs as classes with named fields, kernels as functions that release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/view_caster.h"

namespace py = pybind11;
using namespace endomamba;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of endomamba: pointers, sizes and strides only";

  m.def("levels", &levels, "instruction-set levels this machine runs, best first");
  m.def("level", [] { return kernels().level; }, "the level in use");
  m.def("set_level", &set_level, py::arg("level"));
  m.attr("CHUNK") = kChunk;

#define FIELD(type, name) def_readwrite(#name, &type::name)
  py::class_<ScanDirection>(m, "ScanDirection")
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

  py::class_<ScanArgs>(m, "ScanArgs")
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

  py::class_<ConvDirection>(m, "ConvDirection")
      .def(py::init<>())
      .FIELD(ConvDirection, weight)
      .FIELD(ConvDirection, bias)
      .FIELD(ConvDirection, y)
      .FIELD(ConvDirection, dy)
      .FIELD(ConvDirection, dweight)
      .FIELD(ConvDirection, dbias);

  py::class_<ConvArgs>(m, "ConvArgs")
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

  py::class_<NormArgs>(m, "NormArgs")
      .def(py::init<>())
      .FIELD(NormArgs, b)
      .FIELD(NormArgs, m)
      .FIELD(NormArgs, c)
      .FIELD(NormArgs, dtype)
      .FIELD(NormArgs, threads)
      .FIELD(NormArgs, layer_norm)
      .FIELD(NormArgs, eps)
      .FIELD(NormArgs, x)
      .FIELD(NormArgs, normed)
      .FIELD(NormArgs, residual)
      .FIELD(NormArgs, new_residual)
      .FIELD(NormArgs, weight)
      .FIELD(NormArgs, bias)
      .FIELD(NormArgs, row_scale)
      .FIELD(NormArgs, mean)
      .FIELD(NormArgs, rstd)
      .FIELD(NormArgs, dnormed)
      .FIELD(NormArgs, dnew_residual)
      .FIELD(NormArgs, dx)
      .FIELD(NormArgs, dweight)
      .FIELD(NormArgs, dbias)
      .FIELD(NormArgs, dresidual)
      .FIELD(NormArgs, drow_scale);
#undef FIELD

  // One line a kernel.
  m.def("scan_fwd", [](const ScanArgs& a) { kernels().scan_fwd(a); }, py::call_guard<py::gil_scoped_release>());
  m.def("scan_bwd", [](const ScanArgs& a) { kernels().scan_bwd(a); }, py::call_guard<py::gil_scoped_release>());
  m.def("conv_fwd", [](const ConvArgs& a) { kernels().conv_fwd(a); }, py::call_guard<py::gil_scoped_release>());
  m.def("conv_bwd", [](const ConvArgs& a) { kernels().conv_bwd(a); }, py::call_guard<py::gil_scoped_release>());
  m.def("norm_fwd", [](const NormArgs& a) { kernels().norm_fwd(a); }, py::call_guard<py::gil_scoped_release>());
  m.def("norm_bwd", [](const NormArgs& a) { kernels().norm_bwd(a); }, py::call_guard<py::gil_scoped_release>());
}
