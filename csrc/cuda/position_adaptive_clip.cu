// The clip whose width grows with the position: one block per sequence counts its valid tokens.
#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) clip_kernel(ClipArgs<T> args) {
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
        const auto params = params_at<PositionAdaptiveClip>(args.params, token);
        const T width = power(T(after.count), params.power), low = -params.eps_low * width,
                high = params.eps_high * width;
        const T x = args.log_ratio[token];
        args.clipped[token] = clamp(x, low, high);
        args.inside[token] = x >= low && x <= high;
      },
      memory);
}

template <class T>
const char* position_adaptive_clip(const ClipArgs<T>& args, void* stream) {
  TRL_LAUNCH((clip_kernel<T>), blocks_of(args.spans), kThreads, 0, stream, args);
  return launch_error();
}

template const char* position_adaptive_clip(const ClipArgs<float>&, void*);
template const char* position_adaptive_clip(const ClipArgs<double>&, void*);

static const bool listed = list_kernel("position_adaptive_clip float", &clip_kernel<float>) &&
                           list_kernel("position_adaptive_clip double", &clip_kernel<double>);

}  // namespace tokenrl::cuda
