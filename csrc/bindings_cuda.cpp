// endomamba._C_cuda: the CUDA kernels' launchers.  Streams and scratch come as addresses, as a tensor's data_ptr().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_conv.h"
#include "bindings_scan.h"
#include "cuda/conv.h"
#include "cuda/frame.h"
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

  m.attr("FRAME_BLOCKS") = cuda::kFrameBlocks;
  m.def("frame_memory", &cuda::frame_memory);
  m.def("frame_most_tokens", &cuda::frame_most_tokens);
  m.def("frame_rank", &cuda::frame_rank);
  m.def("frame_shared", &cuda::frame_shared);
  // blocks: 9 addresses each, in the order of FrameBlock; states: 0 of two directions
  m.def("frame_blocks", [=](const std::vector<std::array<uintptr_t, 9>>& blocks, int dtype, int b, int l, int c,
                            int directions, float eps, uintptr_t residual, uintptr_t conv_state, uintptr_t ssm_state,
                            uintptr_t memory, int grid, uintptr_t stream) {
    const auto floats = [&](uintptr_t address) { return static_cast<float*>(pointer(address)); };
    cuda::FrameArgs args{};
    args.blocks = static_cast<int>(blocks.size());
    for (size_t i = 0; i < blocks.size() && i < cuda::kFrameBlocks; ++i) {
      const std::array<uintptr_t, 9>& at = blocks[i];
      args.block[i] = {pointer(at[0]), floats(at[1]), floats(at[2]), pointer(at[3]), pointer(at[4]),
                       floats(at[5]),  floats(at[6]), floats(at[7]), pointer(at[8])};
    }
    args.dtype = dtype, args.b = b, args.l = l, args.c = c, args.directions = directions, args.eps = eps;
    args.residual = floats(residual), args.conv_state = floats(conv_state), args.ssm_state = floats(ssm_state);
    args.memory = pointer(memory);
    cuda::frame_blocks(args, grid, pointer(stream));
  });
}
