// Log-probs, entropies and their gradient through the kernel, against sums in long double and finite differences;
// 16-bit logits.
#include "vocabulary.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace tokenrl;

namespace {

const cpu::Threads kInline{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }};

template <class T>
struct Stats {
  T logp = NAN, entropy = NAN, lse = NAN, lse_rest = NAN;
};

template <class Logit, class T>
LogprobArgs<Logit, T> arguments(const std::vector<Logit>& logits, const int64_t& id, double temperature,
                                Stats<T>& stats) {
  LogprobArgs<Logit, T> args{};
  args.batch = args.time = args.num_ids = 1;
  args.vocab = args.stride_batch = args.stride_time = static_cast<int64_t>(logits.size());
  args.logits = logits.data();
  args.ids = &id;
  args.transform.temperature = static_cast<T>(temperature);
  args.transform.softcap = infinity<T>();
  args.transform.logit_scale = 1;
  args.logp = &stats.logp;
  args.entropy = &stats.entropy;
  args.lse = &stats.lse;
  args.lse_rest = &stats.lse_rest;
  return args;
}

template <class Logit, class T>
Stats<T> stats_of(const std::vector<Logit>& logits, int64_t id, double temperature) {
  Stats<T> stats;
  cpu::token_logprobs(arguments(logits, id, temperature, stats), kInline);
  return stats;
}

template <class Logit, class T>
std::vector<Logit> gradient_of(const std::vector<Logit>& logits, int64_t id, double temperature, T grad_logp,
                               T grad_entropy) {
  Stats<T> stats = stats_of<Logit, T>(logits, id, temperature);
  auto args = arguments(logits, id, temperature, stats);
  std::vector<Logit> grad(logits.size());
  args.grad_logp = &grad_logp;
  args.grad_entropy = &grad_entropy;
  args.grad_logits = grad.data();
  cpu::token_logprobs_backward(args, kInline);
  return grad;
}

template <class Logit>
std::vector<Logit> logits_of(int64_t vocab) {
  std::vector<Logit> logits;
  for (int64_t v = 0; v < vocab; ++v)
    logits.push_back(
        narrow<Logit>(static_cast<decltype(widen(Logit{}))>(3 * std::sin(1.7 * static_cast<double>(v)) + 2)));
  return logits;
}

template <class Logit, class T>
void check_values(const std::vector<Logit>& logits, int64_t id, double temperature, double tolerance,
                  const std::string& what) {
  long double highest = -INFINITY, mass = 0, entropy = 0;
  const auto z = [&](int64_t v) { return static_cast<long double>(widen(logits[v])) / temperature; };
  for (size_t v = 0; v < logits.size(); ++v) highest = std::max(highest, z(v));
  for (size_t v = 0; v < logits.size(); ++v) mass += std::exp(z(v) - highest);
  const long double lse = highest + std::log(mass);
  for (size_t v = 0; v < logits.size(); ++v) {
    const long double p = std::exp(z(v) - lse);
    if (p > 0) entropy -= p * (z(v) - lse);
  }
  const Stats<T> stats = stats_of<Logit, T>(logits, id, temperature);
  near(what + ": lse", stats.lse, static_cast<double>(lse), tolerance);
  near(what + ": logp", stats.logp, static_cast<double>(z(id) - lse), tolerance);
  near(what + ": entropy", stats.entropy, static_cast<double>(entropy), tolerance);
}

// Vocabularies around the kernel's block, with logits masked by -inf or by the lowest number, whole blocks of them too.
template <class Logit, class T>
void check_type(const std::string& type, double lowest, double tolerance) {
  for (const int64_t vocab : {1, 2, 511, 512, 513, 4999})
    for (const double temperature : {1.0, 0.7}) {
      const std::string what = type + " V " + std::to_string(vocab) + " temperature " + std::to_string(temperature);
      std::vector<Logit> logits = logits_of<Logit>(vocab);
      check_values<Logit, T>(logits, vocab - 1, temperature, tolerance, what);
      for (const double masked : {-std::numeric_limits<double>::infinity(), lowest}) {
        std::vector<Logit> some = logits;
        std::fill(some.begin(), some.begin() + vocab / 2, narrow<Logit>(static_cast<T>(masked)));
        check_values<Logit, T>(some, vocab - 1, temperature, tolerance,
                               what + " half masked by " + std::to_string(masked));
        std::reverse(some.begin(), some.end());
        check_values<Logit, T>(some, 0, temperature, tolerance,
                               what + " second half masked by " + std::to_string(masked));
        for (const Logit g : gradient_of<Logit, T>(some, 0, temperature, T(1), T(1)))
          near(what + ": the gradient is finite", std::isfinite(widen(g)), 1, 0);
      }
    }
}

void check_gradient() {
  const double temperature = 0.8;
  for (const int64_t vocab : {2, 700}) {
    std::vector<double> logits = logits_of<double>(vocab);
    const int64_t id = vocab / 3;
    const std::vector<double> grad = gradient_of<double, double>(logits, id, temperature, 0.6, -1.4);
    for (int64_t v = id % 31; v < vocab; v += vocab > 10 ? 31 : 1) {  // meets the id itself
      const auto loss = [&](double step) {
        std::vector<double> moved = logits;
        moved[v] += step;
        const Stats<double> stats = stats_of<double, double>(moved, id, temperature);
        return 0.6 * stats.logp - 1.4 * stats.entropy;
      };
      const double h = 1e-5, difference = (loss(h) - loss(-h)) / (2 * h);
      near("gradient of logit " + std::to_string(v), grad[v], difference, 1e-8);
    }
  }
}

void check_special_rows() {
  const std::vector<float> logits = logits_of<float>(600), none(600, -INFINITY);
  const Stats<float> ignored = stats_of<float, float>(std::vector<float>(600, NAN), kIgnoredId, 1);
  for (const float x : {ignored.logp, ignored.entropy, ignored.lse})
    near("an ignored id, whatever the row holds", x, 0, 0);
  for (const float g : gradient_of<float, float>(std::vector<float>(600, NAN), kIgnoredId, 1, 1, 1))
    near("gradient of an ignored row", g, 0, 0);
  for (const int64_t id : {-1, 600})
    near("an id out of range gives NaN", std::isnan(stats_of<float, float>(logits, id, 1).logp), 1, 0);
  near("nothing but -inf gives NaN", std::isnan(stats_of<float, float>(none, 3, 1).logp), 1, 0);
}

// Every half and every bfloat16 is what its float narrows to; and values between two neighbours go to the even one.
template <class Logit>
void check_conversion(uint16_t infinity_bits, const std::string& type) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Logit x{static_cast<uint16_t>(bits)};
    if ((bits & 0x7fffu) > infinity_bits) {
      near(type + ": a NaN stays one", std::isnan(widen(x)) && std::isnan(widen(narrow<Logit>(widen(x)))), 1, 0);
      continue;
    }
    near(type + " there and back", narrow<Logit>(widen(x)).bits, bits, 0);
    if ((bits & 0x7fffu) + 1 >= infinity_bits) continue;
    const double next = widen(Logit{static_cast<uint16_t>(bits + 1)}), between = (widen(x) + next) / 2;
    near(type + ": a tie goes to even", narrow<Logit>(static_cast<float>(between)).bits, bits + (bits & 1u), 0);
  }
}

}  // namespace

int main() {
  check_type<float, float>("float", -std::numeric_limits<float>::max(), 2e-6);
  check_type<double, double>("double", -std::numeric_limits<double>::max(), 1e-13);
  check_type<BFloat16, float>("bfloat16", -3.3895e38, 2e-6);
  check_type<Half, float>("half", -65504, 2e-6);
  check_gradient();
  check_special_rows();
  check_conversion<BFloat16>(0x7f80, "bfloat16");
  check_conversion<Half>(0x7c00, "half");
  return report("token_logprobs");
}
