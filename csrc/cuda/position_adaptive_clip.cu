// The clip whose width grows with the position: one block per sequence counts its valid tokens.
#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) band_kernel(BandArgs<T> args) {
  TRL_SHARED(Running<T>, memory, kWarps);
  const int64_t i = blockIdx.x;
  clear_outside(args.spans, i, [&](int64_t token) { args.clipped[token] = args.inside[token] = 0; });
  if (i >= args.spans.num_sequences) return;
  walk<T>(
      sequence_of(args.spans, i), false, Combine<T>{Fold::add},
      [&](int64_t token) { return Running<T>{0, is_valid(args.spans, token), T(0)}; },
      [&](int64_t token, const Running<T>&, const Running<T>& after) {
        args.clipped[token] = args.inside[token] = 0;
        if (!is_valid(args.spans, token)) return;
        T params[3];
#pragma unroll
        for (int k = 0; k < 3; ++k)
          params[k] = args.params[k].tensor ? args.params[k].tensor[token] : args.params[k].value;
        const T width = power(T(after.count), params[2]), low = -params[0] * width, high = params[1] * width;
        const T x = args.log_ratio[token];
        args.clipped[token] = clamp(x, low, high);
        args.inside[token] = x >= low && x <= high;
      },
      memory);
}

template <class T>
const char* position_adaptive_clip(const BandArgs<T>& args, void* stream) {
  TRL_LAUNCH((band_kernel<T>), blocks_of(args.spans), kThreads, 0, stream, args);
  return launch_error();
}

template const char* position_adaptive_clip(const BandArgs<float>&, void*);
template const char* position_adaptive_clip(const BandArgs<double>&, void*);

static const bool listed = list_kernel("position_adaptive_clip float", &band_kernel<float>) &&
                           list_kernel("position_adaptive_clip double", &band_kernel<double>);

}  // namespace tokenrl::cuda
