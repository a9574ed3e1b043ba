// Every kind of divergence, the lse of both heads and the gradients of their logits under several schedules, against
// loops in double.
#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

// Rows of both heads' logits, some taken out of both: by -inf or, with everything, by a keep mask under softcaps and
// temperatures of the rows. Row 1 is left out. `gap` logits between rows leave them at every alignment, and each head's
// at its own.
template <class Logit, class T>
struct Heads {
  int64_t rows, vocab, gap;
  bool everything;
  std::vector<Logit> logits[2];
  std::vector<T> temperatures, grad;
  std::vector<double> lse[2];
  std::unique_ptr<bool[]> keep, used;
  T softcap[2] = {5, 9}, scale[2] = {T(0.9), T(1.2)}, params[2] = {T(0.3), T(0.6)};

  Heads(int64_t rows, int64_t vocab, int64_t gap, bool everything)
      : rows(rows), vocab(vocab), gap(gap), everything(everything), keep(new bool[rows * vocab]), used(new bool[rows]) {
    std::mt19937 random(5);
    std::normal_distribution<double> normal(0.0, 2.0);
    for (int h = 0; h < 2; ++h) logits[h].assign(rows * stride(h), narrow<Logit>(static_cast<T>(std::nan(""))));
    for (int64_t i = 0; i < rows; ++i) {
      used[i] = i != 1;
      temperatures.push_back(static_cast<T>(0.7 + 0.1 * static_cast<double>(i)));
      grad.push_back(i == 2 ? T(0) : static_cast<T>(1.5 - static_cast<double>(i)));
      for (int64_t v = 0; v < vocab; ++v) {
        keep[i * vocab + v] = v * 7 % 5 != 1;
        const double x = normal(random);
        for (int h = 0; h < 2; ++h)
          logits[h][i * stride(h) + v] = narrow<Logit>(static_cast<T>(x < -3.5 ? -INFINITY : x + h * normal(random)));
      }
    }
    for (int h = 0; h < 2; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        double sum = 0;
        for (int64_t v = 0; v < vocab; ++v) sum += std::exp(z(h, i, v));
        lse[h].push_back(std::log(sum));
      }
  }
  int64_t stride(int h) const { return vocab + gap * (h + 1); }
  double temperature(int64_t i) const { return everything ? static_cast<double>(temperatures[i]) : 0.8; }
  // Inside the softcap's tanh, then z.
  double bent(int h, int64_t i, int64_t v) const {
    return std::tanh(widen(logits[h][i * stride(h) + v]) * static_cast<double>(scale[h] / softcap[h]));
  }
  double z(int h, int64_t i, int64_t v) const {
    const double x = widen(logits[h][i * stride(h) + v]);
    if (!everything || x == -INFINITY) return x / temperature(i);
    return keep[i * vocab + v] ? softcap[h] * bent(h, i, v) / temperature(i) : -INFINITY;
  }
  double slope(int h, int64_t i, int64_t v) const {
    if (!everything) return 1 / temperature(i);
    return static_cast<double>(scale[h]) * (1 - bent(h, i, v) * bent(h, i, v)) / temperature(i);
  }
  LogprobArgs<Logit, T> head(int h) {
    LogprobArgs<Logit, T> args{};
    args.batch = 1, args.time = rows, args.vocab = vocab;
    args.stride_batch = rows * stride(h), args.stride_time = stride(h);
    args.logits = logits[h].data();
    args.transform = {T(0.8), infinity<T>(), T(1), nullptr, nullptr, 0, 0};
    if (everything)
      args.transform = {T(0.8), softcap[h], scale[h], temperatures.data(), keep.get(), rows * vocab, vocab};
    args.grad_stride_batch = rows * vocab, args.grad_stride_time = vocab;
    return args;
  }
  DivergenceArgs<Logit, T> args() {
    DivergenceArgs<Logit, T> args{};
    args.of = head(0), args.other = head(1), args.rows = used.get();
    for (int k = 0; k < 2; ++k) args.params[k] = params[k];
    return args;
  }
};

// value, by_p, by_r and the lse of both heads of each row; the gradients of both.
struct Truth {
  std::vector<double> sums, grads[2];
};

template <class Kind, class Logit, class T>
Truth truth_of(const Heads<Logit, T>& given) {
  const auto params = params_from<Kind, double>([&](size_t k) { return static_cast<double>(given.params[k]); });
  const int64_t rows = given.rows, vocab = given.vocab;
  Truth truth{std::vector<double>(5 * rows), {std::vector<double>(rows * vocab), std::vector<double>(rows * vocab)}};
  for (int64_t i = 0; i < rows; ++i) {
    if (!given.used[i]) continue;
    const auto log_prob = [&](int h, int64_t v) { return given.z(h, i, v) - given.lse[h][i]; };
    for (int h = 0; h < 2; ++h) truth.sums[(3 + h) * rows + i] = given.lse[h][i];
    std::vector<Pair<double>> pairs;
    std::vector<Diverged<double>> parts;
    for (int64_t v = 0; v < vocab; ++v) {
      const double log_p = log_prob(0, v), log_r = log_prob(1, v);
      pairs.push_back({log_p, log_r, std::exp(log_p), std::exp(log_r)});
      parts.push_back(Kind::eval(pairs.back(), params));
      truth.sums[i] += parts.back().value;
      truth.sums[rows + i] += parts.back().by_p;
      truth.sums[2 * rows + i] += parts.back().by_r;
    }
    for (int64_t v = 0; v < vocab; ++v) {
      if (pairs[v].log_p == -INFINITY || given.grad[i] == 0) continue;
      const double up = static_cast<double>(given.grad[i]);
      truth.grads[0][i * vocab + v] = up * (parts[v].by_p - pairs[v].p * truth.sums[rows + i]) * given.slope(0, i, v);
      truth.grads[1][i * vocab + v] =
          up * (parts[v].by_r - pairs[v].r * truth.sums[2 * rows + i]) * given.slope(1, i, v);
    }
  }
  return truth;
}

template <class Kind, class Logit, class T>
void check_divergence(Heads<Logit, T>& given) {
  const int64_t rows = given.rows, vocab = given.vocab;
  const std::string what = std::string(Kind::name) + " V=" + std::to_string(vocab) + " rows=" + std::to_string(rows) +
                           " bytes=" + std::to_string(sizeof(Logit)) + (given.everything ? " everything" : "");
  DivergenceArgs<Logit, T> args = given.args();
  std::vector<char> scratch(cuda::divergence_scratch_bytes(args), '\xff');
  // value, by_p, by_r, both lse, what rounding took of them.
  std::vector<T> found(7 * rows);
  T** const places[] = {&args.value,     &args.by_p,        &args.by_r,          &args.of.lse,
                        &args.other.lse, &args.of.lse_rest, &args.other.lse_rest};
  for (int64_t k = 0; k < 7; ++k) *places[k] = found.data() + k * rows;
  const auto forward = [&] {
    std::fill_n(found.begin(), args.statistics_known ? 3 * rows : 7 * rows, static_cast<T>(std::nan("")));
    expect(!cuda::divergence(args, Kind::name, scratch.data(), nullptr), what);
    return found;
  };
  const std::vector<T> made = under_all_schedules(what, forward);
  args.statistics_known = true;
  expect(same_bits(forward(), made), what + " from known statistics");
  const Truth truth = truth_of<Kind>(given);
  for (int64_t k = 0; k < 2 * rows; ++k)
    expect(std::fabs(made[5 * rows + k]) <= std::fabs(made[3 * rows + k]) * std::numeric_limits<T>::epsilon() + 1e-30,
           what + ": lse_rest");
  expect_close(std::vector<T>(made.begin(), made.begin() + 5 * rows), truth.sums, tolerance_of<T>(), what);
  args.grad = given.grad.data();
  for (int h = 0; h < 2; ++h) {
    args.of_other = h == 1, args.by = found.data() + (h + 1) * rows;
    const auto grads = under_all_schedules(what + " backward", [&] {
      std::vector<Logit> grad(rows * vocab, narrow<Logit>(static_cast<T>(std::nan(""))));
      args.of.grad_logits = grad.data();
      expect(!cuda::divergence_backward(args, Kind::name, nullptr), what);
      return grad;
    });
    std::vector<double> wide;
    for (const Logit x : grads) wide.push_back(widen(x));
    expect_close(wide, truth.grads[h], sizeof(Logit) == 2 ? 4e-3 : tolerance_of<T>(), what + " backward");
  }
}

template <class Logit, class T, class... Kind>
void check_every(int64_t rows, int64_t vocab, int64_t gap, bool everything, std::tuple<Kind...>*) {
  Heads<Logit, T> given(rows, vocab, gap, everything);
  (check_divergence<Kind>(given), ...);
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  Divergences* every = nullptr;
  for (const bool everything : {false, true}) {
    check_every<float, float>(5, 333, 1, everything, every);
    check_every<double, double>(3, 64, 0, everything, every);
    check_every<BFloat16, float>(5, 1003, 3, everything, every);
    check_every<Half, float>(3, 7, 0, everything, every);
  }
  std::tuple<Jsd>* one = nullptr;
  check_every<float, float>(2, 1, 0, false, one);
  check_every<BFloat16, float>(4, 4096, 8, false, one);
  check_every<BFloat16, float>(1, 20011, 0, true, one);  // several blocks share the row
  std::printf("all as expected\n");
}
