// The clip whose width grows with the position: one block per sequence counts its valid tokens.
#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {
namespace {

template <class T>
struct Clip {
  const ClipArgs<T>& args;
  bool lies_aligned;
  int64_t first = 0;
  unsigned valid = 0;
  Items<T> clipped = {}, inside = {};

  __device__ __forceinline__ bool aligned() const { return lies_aligned; }
  __device__ __forceinline__ void load(const Place& place) {
    first = place.first;
    valid = valid_bits(args.spans, place);
    load_items(place, source(args.log_ratio, clipped));
  }
  __device__ __forceinline__ Running<T> element(int k) const { return {0, int32_t(valid >> k & 1), T(0)}; }
  __device__ __forceinline__ void visit(int k, const Running<T>&, const Running<T>& after) {
    const T x = clipped.of[k];
    clipped.of[k] = inside.of[k] = 0;
    if (!(valid >> k & 1)) return;
    const auto params = params_at<PositionAdaptiveClip>(args.params, first + k);
    const T width = power(T(after.count), params.power), low = -params.eps_low * width, high = params.eps_high * width;
    clipped.of[k] = clamp(x, low, high);
    inside.of[k] = x >= low && x <= high;
  }
  __device__ __forceinline__ void store(const Place& place) const {
    store_items(place, args.clipped, clipped);
    store_items(place, args.inside, inside);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) clip_kernel(ClipArgs<T> args, bool aligned) {
  TRL_SHARED(Running<T>, memory, kWarps + 1);
  const TileRange share =
      tile_range(args.spans, false, [&](int64_t token) { args.clipped[token] = args.inside[token] = 0; });
  Clip<T> pass{args, aligned};
  walk<false>(share, static_cast<const Running<T>*>(nullptr), Combine<T, Fold::add>{}, pass, memory);
}

}  // namespace

template <class T>
const char* position_adaptive_clip(const ClipArgs<T>& args, void* stream) {
  TRL_LAUNCH((clip_kernel<T>), blocks_of(args.spans, false), kThreads, 0, stream, args,
             are_aligned(args.spans, args.log_ratio, args.clipped, args.inside));
  return launch_error();
}

template const char* position_adaptive_clip(const ClipArgs<float>&, void*);
template const char* position_adaptive_clip(const ClipArgs<double>&, void*);

static const bool listed = list_kernel("position_adaptive_clip float", &clip_kernel<float>) &&
                           list_kernel("position_adaptive_clip double", &clip_kernel<double>);

}  // namespace tokenrl::cuda
