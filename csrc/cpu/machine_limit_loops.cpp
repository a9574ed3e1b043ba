// The loops that machine_limits.cpp measures. Compiled once per instruction set (TOKENRL_ISA).
#include "kernels.h"
#include "lanes.h"

namespace tokenrl::cpu::TOKENRL_ISA {

// Four streams, as several rows are read at once; integer sums, whose latency never holds up a load.
uint64_t sum_words(const uint64_t* words, int64_t n) {
  const int64_t quarter = n / 4;
  const uint64_t *a = words, *b = a + quarter, *c = b + quarter, *d = c + quarter;
  uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < quarter; ++i) sum += (a[i] + b[i]) + (c[i] + d[i]);
  for (int64_t i = 4 * quarter; i < n; ++i) sum += words[i];
  return sum;
}

// Exponentials as token_logprobs takes them. The offset differs per round, so that no round can be left out.
float sum_exponentials(const float* values, int64_t n, int64_t rounds) {
  const Exponential<float> e_to(1);
  Floats sum[kUnroll] = {};
  for (int64_t round = 0; round < rounds; ++round) {
    const float offset = 1e-6f * static_cast<float>(round & 1023);
    for (int64_t i = 0; i < n; i += kStep) {
      Floats d[kUnroll], e[kUnroll];
      for (int u = 0; u < kUnroll; ++u) d[u] = load(values + i + u * kLanes) - offset;
      e_to(d, e);
      for (int u = 0; u < kUnroll; ++u) sum[u] += e[u];
    }
  }
  return sum_of(sum);
}

}  // namespace tokenrl::cpu::TOKENRL_ISA
