// endomamba._C: argument structs as classes with named fields, kernels as functions that release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings_conv.h"
#include "bindings_scan.h"
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

// Contiguous, of these sizes, at an address (0: absent).
View contiguous(int64_t address, std::initializer_list<int64_t> sizes) {
  View view;
  view.p = reinterpret_cast<char*>(address);
  int64_t stride = 1, i = int64_t(sizes.size());
  for (auto size = sizes.end(); size != sizes.begin(); stride *= *--size) view.s[--i] = stride;
  return view;
}

// The forward calls of a frame come as plain numbers, and what is contiguous as an address alone: structs filled field
// by field from Python cost as much as a small frame's kernel.

// sizes: b, l, d, n, w, r.  sides: 8 addresses for each direction.
void mixer_fwd(const std::array<int64_t, 6>& sizes, int dtype, int threads, double scale, bool log_A, const View& x,
               const View& z, int64_t y, const View& conv_state, const View& ssm_state, const View& final_conv_state,
               const View& final_ssm_state, const std::vector<int64_t>& sides) {
  MixerArgs a;
  a.b = sizes[0], a.l = sizes[1], a.d = sizes[2], a.n = sizes[3], a.w = sizes[4], a.r = sizes[5];
  a.dtype = dtype, a.threads = threads, a.scale = float(scale), a.log_A = log_A;
  a.x = x, a.z = z;
  a.initial_conv_state = conv_state, a.initial_state = ssm_state;
  a.final_conv_state = final_conv_state, a.final_state = final_ssm_state;
  a.directions = int(sides.size()) / 8;
  a.y = contiguous(y, {a.b, a.l, a.d});
  for (int i = 0; i < a.directions; ++i) {
    MixerDirection& dir = a.dir[i];
    const int64_t* at = sides.data() + 8 * i;
    dir.conv_weight = contiguous(at[0], {a.d, a.w});
    dir.conv_bias = contiguous(at[1], {a.d});
    dir.x_proj = contiguous(at[2], {a.r + 2 * a.n, a.d});
    dir.dt_proj = contiguous(at[3], {a.d, a.r});
    dir.dt_bias = contiguous(at[4], {a.d});
    dir.A = contiguous(at[5], {a.d, a.n});
    dir.D = contiguous(at[6], {a.d});
    dir.chunk_states = contiguous(at[7], {a.b, (a.l + kChunk - 1) / kChunk, a.d, a.n});
  }
  kernels().mixer_fwd(a);
}

// sizes: b, m, c.  outputs: normed, new residual and the rows of stats, the mean's first; no stats (0): none written.
void norm_fwd(const std::array<int64_t, 3>& sizes, int dtype, int threads, bool layer_norm, double eps, const View& x,
              const View& residual, const View& weight, const View& bias, const View& row_scale,
              const std::array<int64_t, 3>& outputs) {
  NormArgs a;
  a.b = sizes[0], a.m = sizes[1], a.c = sizes[2];
  a.dtype = dtype, a.threads = threads, a.layer_norm = layer_norm, a.eps = float(eps);
  a.x = x, a.residual = residual, a.weight = weight, a.bias = bias, a.row_scale = row_scale;
  a.normed = contiguous(outputs[0], {a.b, a.m, a.c});
  a.new_residual = contiguous(outputs[1], {a.b, a.m, a.c});
  if (outputs[2] != 0) {
    if (layer_norm) a.mean = contiguous(outputs[2], {a.b * a.m});
    a.rstd = contiguous(outputs[2] + (layer_norm ? 4 * a.b * a.m : 0), {a.b * a.m});
  }
  kernels().norm_fwd(a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of endomamba: pointers, sizes and strides only";

  m.def("levels", &levels, "instruction-set levels this machine runs, best first");
  m.def("level", [] { return kernels().level; }, "the level in use");
  m.def("set_level", &set_level, py::arg("level"));
  m.attr("CHUNK") = kChunk;

  bind_scan_arguments(m);
#define FIELD(type, name) def_readwrite(#name, &type::name)
  bind_conv_arguments(m);

  py::class_<NormArgs>(m, "NormArgs")
      .def(py::init<>())
      .FIELD(NormArgs, b)
      .FIELD(NormArgs, m)
      .FIELD(NormArgs, c)
      .FIELD(NormArgs, dtype)
      .FIELD(NormArgs, threads)
      .FIELD(NormArgs, layer_norm)
      .FIELD(NormArgs, x)
      .FIELD(NormArgs, new_residual)
      .FIELD(NormArgs, weight)
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
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("scan_fwd", kernel("scan", &Kernels::scan_fwd), Release());
  m.def("scan_bwd", kernel("scan", &Kernels::scan_bwd), Release());
  m.def("conv_fwd", kernel("causal_conv1d", &Kernels::conv_fwd), Release());
  m.def("conv_bwd", kernel("causal_conv1d", &Kernels::conv_bwd), Release());
  m.def("norm_fwd", &norm_fwd, Release());
  m.def("norm_bwd", kernel("add_rms_norm", &Kernels::norm_bwd), Release());
  m.def("mixer_fwd", &mixer_fwd, Release());
}
