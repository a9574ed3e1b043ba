// The clip whose width grows with the position: one walk forwards that counts valid tokens.
#include "walk.h"

namespace tokenrl::cpu {

template <class T>
void position_adaptive_clip(const ClipArgs<T>& args, const Threads& threads) {
  clear_outside(args.spans, args.clipped);
  clear_outside(args.spans, args.inside);
  parallel(threads, args.spans.num_sequences, sequences_of(args.spans, 8192), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence q = sequence_of(args.spans, i);
      T t = 0;
      for (int64_t token = q.begin; token < q.end; ++token) {
        args.clipped[token] = args.inside[token] = 0;
        if (!is_valid(args.spans, token)) continue;
        t += 1;
        const auto params = params_at<PositionAdaptiveClip>(args.params, token);
        const T width = power(t, params.power), low = -params.eps_low * width, high = params.eps_high * width;
        const T x = args.log_ratio[token];
        args.clipped[token] = clamp(x, low, high);
        args.inside[token] = x >= low && x <= high;
      }
    }
  });
}

template void position_adaptive_clip(const ClipArgs<float>&, const Threads&);
template void position_adaptive_clip(const ClipArgs<double>&, const Threads&);

}  // namespace tokenrl::cpu
