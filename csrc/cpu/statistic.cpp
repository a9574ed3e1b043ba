// The statistics and their adjoints as an op of their own.
#include <algorithm>
#include <vector>

#include "walk.h"

namespace tokenrl::cpu {

template <class T>
void statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, const Threads& threads) {
  clear_outside(args.spans, args.output);
  parallel(threads, args.spans.num_sequences, sequences_of(args.spans, 8192), [&](int64_t begin, int64_t end) {
    std::vector<T> x, t;
    for (int64_t i = begin; i < end; ++i) {
      const Sequence q = sequence_of(args.spans, i);
      const size_t n = static_cast<size_t>(std::max<int64_t>(q.end - q.begin, 0));
      x.resize(n), t.resize(n);
      for (size_t k = 0; k < n; ++k) {
        const int64_t token = q.begin + static_cast<int64_t>(k);
        const bool valid = is_valid(args.spans, token);
        x[k] = valid ? args.input[token] - (args.input2 ? args.input2[token] : T(0)) : T(0);
      }
      T* out = args.output + q.begin;
      if (adjoint) {
        scan(args.spans, q, Statistic::token, x.data(), out, t.data());
        adjoint_of(args.spans, q, statistic, t.data(), x.data());
        std::copy(x.begin(), x.end(), out);
      } else {
        statistic_of(args.spans, q, statistic, x.data(), out, t.data());
      }
      for (size_t k = 0; k < n; ++k)
        if (!is_valid(args.spans, q.begin + static_cast<int64_t>(k))) out[k] = 0;
    }
  });
}

template void statistic(const StatisticArgs<float>&, Statistic, bool, const Threads&);
template void statistic(const StatisticArgs<double>&, Statistic, bool, const Threads&);

}  // namespace tokenrl::cpu
