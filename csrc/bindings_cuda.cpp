// endomamba._C_cuda: the CUDA kernels' launchers.  Streams and scratch come as addresses, as a tensor's data_ptr().
#include <pybind11/pybind11.h>

#include "bindings_conv.h"
#include "bindings_scan.h"
#include "cuda/conv.h"
#include "cuda/scan.h"

namespace py = pybind11;
using namespace endomamba;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of endomamba: pointers, sizes, strides and a stream";
  m.attr("CHUNK") = kChunk;
  bind_conv_arguments(m);
  bind_scan_arguments(m);

  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
#ifdef ENDOMAMBA_HOST
  m.def(
      "descending", [](bool on) { cuda::descending = on; }, "in which order the lanes of a warp run, see cuda_host.h");
#endif
  m.def("walk_shared", &cuda::walk_shared);
  m.def("frame_tokens", &cuda::frame_tokens);
  m.def("frame_bytes", &cuda::frame_bytes);
  m.def("scan_walk", [=](const ScanArgs& args, uintptr_t park, uintptr_t stream) {
    cuda::scan_walk(args, static_cast<float*>(pointer(park)), pointer(stream));
  });
  m.def("scan_frame", [=](const ScanArgs& args, int64_t processors, uintptr_t stream) {
    cuda::scan_frame(args, processors, pointer(stream));
  });
  m.def("scan_back_sizes", [](int64_t b, int64_t l, int64_t d, int64_t workers) {
    const cuda::BackSizes sizes = cuda::scan_back_sizes(b, l, d, workers);
    return py::make_tuple(sizes.blocks, sizes.scratch, sizes.sums, sizes.parts);
  });
  m.def("scan_back", [=](const ScanArgs& args, int which, uintptr_t scratch, uintptr_t sums, uintptr_t parts,
                         uintptr_t park, bool parks, int64_t workers, uintptr_t stream) {
    const auto floats = [&](uintptr_t address) { return static_cast<float*>(pointer(address)); };
    cuda::scan_back(args, which, {floats(scratch), floats(sums), floats(parts), floats(park), workers, parks},
                    pointer(stream));
  });
  m.def("conv_forward", [=](const ConvArgs& args, uintptr_t stream) { cuda::conv_forward(args, pointer(stream)); });
  m.def("conv_pieces", &cuda::conv_pieces);
  m.def("conv_backward", [=](const ConvArgs& args, int64_t workers, uintptr_t parts, uintptr_t stream) {
    cuda::conv_backward(args, workers, static_cast<float*>(pointer(parts)), pointer(stream));
  });
}
