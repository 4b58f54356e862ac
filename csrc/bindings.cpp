// endomamba._C: argument structs as classes with named fields, kernels as functions that release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/view_caster.h"

namespace py = pybind11;
using namespace endomamba;

namespace {

// Reading cu_seqlens costs nothing on a CPU, and a wrong one would make the kernels walk out of their tensors.
template <class Args>
void check_packed(const char* op, const Args& a) {
  if (!a.cu_seqlens) return;
  const int64_t* ends = a.cu_seqlens.template at<int64_t>();
  bool good = ends[0] == 0 && ends[a.b] == a.l;
  for (int64_t i = 0; i < a.b; ++i) good = good && ends[i] <= ends[i + 1];
  if (good) return;
  throw std::invalid_argument(std::string(op) +
                              ": cu_seqlens must start at 0, never fall and end at l = " + std::to_string(a.l) +
                              ", got " + std::to_string(ends[0]) + " to " + std::to_string(ends[a.b]));
}

// A checked kernel of the level in use.
template <class Args>
auto kernel(const char* op, void (*Kernels::*run)(const Args&)) {
  return [op, run](const Args& a) {
    if constexpr (std::is_same_v<Args, ScanArgs> || std::is_same_v<Args, ConvArgs>) check_packed(op, a);
    (kernels().*run)(a);
  };
}

}  // namespace

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
  py::class_<MixerDirection>(m, "MixerDirection")
      .def(py::init<>())
      .FIELD(MixerDirection, conv_weight)
      .FIELD(MixerDirection, conv_bias)
      .FIELD(MixerDirection, x_proj)
      .FIELD(MixerDirection, dt_proj)
      .FIELD(MixerDirection, dt_bias)
      .FIELD(MixerDirection, A)
      .FIELD(MixerDirection, D)
      .FIELD(MixerDirection, u)
      .FIELD(MixerDirection, projected);

  py::class_<MixerArgs>(m, "MixerArgs")
      .def(py::init<>())
      .FIELD(MixerArgs, b)
      .FIELD(MixerArgs, l)
      .FIELD(MixerArgs, d)
      .FIELD(MixerArgs, n)
      .FIELD(MixerArgs, w)
      .FIELD(MixerArgs, r)
      .FIELD(MixerArgs, dtype)
      .FIELD(MixerArgs, threads)
      .FIELD(MixerArgs, log_A)
      .FIELD(MixerArgs, scale)
      .FIELD(MixerArgs, x)
      .FIELD(MixerArgs, z)
      .FIELD(MixerArgs, y)
      .FIELD(MixerArgs, initial_conv_state)
      .FIELD(MixerArgs, final_conv_state)
      .FIELD(MixerArgs, initial_state)
      .FIELD(MixerArgs, final_state)
      .def_property_readonly("projected_floats", &projected_floats)
      .def("add_direction", [](MixerArgs& a, const MixerDirection& dir) { a.dir[a.directions++] = dir; });
#undef FIELD

  // One line a kernel.
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("scan_fwd", kernel("scan", &Kernels::scan_fwd), Release());
  m.def("scan_bwd", kernel("scan", &Kernels::scan_bwd), Release());
  m.def("conv_fwd", kernel("causal_conv1d", &Kernels::conv_fwd), Release());
  m.def("conv_bwd", kernel("causal_conv1d", &Kernels::conv_bwd), Release());
  m.def("norm_fwd", kernel("add_rms_norm", &Kernels::norm_fwd), Release());
  m.def("norm_bwd", kernel("add_rms_norm", &Kernels::norm_bwd), Release());
  m.def("mixer_fwd", kernel("mixer_inner", &Kernels::mixer_fwd), Release());
}
