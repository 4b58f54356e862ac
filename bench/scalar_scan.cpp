// The loop shape of ggml's Mamba-1 scan on a CPU (ggml_compute_forward_ssm_scan): tokens outside, channels inside, states
// innermost, scalar expf, the state in memory.  Written for this comparison, one thread; the shape is ggml's, no line is.
#include <cmath>
#include <cstdint>

extern "C" void scalar_scan(int64_t l, int64_t d, int64_t n, const float* x, const float* dt, const float* A,
                            const float* B, const float* C, float* h, float* y) {
  for (int64_t t = 0; t < l; ++t)
    for (int64_t c = 0; c < d; ++c) {
      const float raw = dt[t * d + c];
      const float step = raw <= 20.0f ? log1pf(expf(raw)) : raw;
      const float input = x[t * d + c] * step;
      float sum = 0.0f;
      for (int64_t s = 0; s < n; ++s) {
        const float state = h[c * n + s] * expf(step * A[c * n + s]) + B[t * n + s] * input;
        sum += state * C[t * n + s];
        h[c * n + s] = state;
      }
      y[t * d + c] = sum;
    }
}
