// The statistics of logits and their gradient under several schedules, against loops in double.
#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

template <class Logit, class T>
std::vector<Logit> random_logits(int64_t n) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal(0.0, 2.0);
  std::vector<Logit> logits(n);
  for (auto& x : logits) {
    const double z = normal(random);
    x = narrow<Logit>(static_cast<T>(z < -3.5 ? -INFINITY : z));
  }
  return logits;
}

template <class Logit>
std::vector<double> widened(const std::vector<Logit>& logits) {
  std::vector<double> wide;
  for (const Logit x : logits) wide.push_back(widen(x));
  return wide;
}

// logp, entropy and lse of each row; the gradient of the logits.
struct Truth {
  std::vector<double> stats, grad;
};

template <class Logit, class T>
Truth plain_truth(const LogprobArgs<Logit, T>& args) {
  const int64_t rows = args.batch * args.time, vocab = args.vocab;
  const double temperature = args.transform.temperature;
  Truth truth{std::vector<double>(3 * rows), std::vector<double>(rows * vocab)};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t id = args.ids[i];
    if (id == kIgnoredId) continue;
    const Logit* row = args.logits + i / args.time * args.stride_batch + i % args.time * args.stride_time;
    double sum = 0, entropy = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(widen(row[v]) / temperature);
    const double lse = std::log(sum);
    const auto log_p = [&](int64_t v) { return widen(row[v]) / temperature - lse; };
    for (int64_t v = 0; v < vocab; ++v)
      if (std::isfinite(log_p(v))) entropy -= std::exp(log_p(v)) * log_p(v);
    truth.stats[i] = id < vocab ? log_p(id) : std::nan("");
    truth.stats[rows + i] = sum > 0 ? entropy : std::nan("");  // as torch has it for a row of nothing but -inf
    truth.stats[2 * rows + i] = lse;
    for (int64_t v = 0; v < vocab; ++v) {
      const double p = std::exp(log_p(v)), pull = p > 0 ? p * (log_p(v) + entropy) : 0.0;
      truth.grad[i * vocab + v] = (args.grad_logp[i] * ((v == id) - p) - args.grad_entropy[i] * pull) / temperature;
    }
  }
  return truth;
}

// Two rows of three tokens, of which the last is ignored; `gap` logits between tokens leave rows at every alignment.
template <class Logit, class T>
void check_logprobs(int64_t vocab, int64_t gap) {
  const int64_t rows = 6, stride = vocab + gap, stride_batch = 3 * stride + 1;
  const auto logits = random_logits<Logit, T>(stride_batch + 2 * stride + vocab);
  const std::vector<int64_t> ids{0, vocab - 1, vocab / 2, vocab / 3, vocab + 4, kIgnoredId};
  const std::vector<T> grad_logp{1, T(-0.5), 0, 2, 1, 3}, grad_entropy{0, 1, T(0.25), -1, 1, 3};
  const std::string what =
      "logprobs V=" + std::to_string(vocab) + " gap=" + std::to_string(gap) + " bytes=" + std::to_string(sizeof(Logit));
  LogprobArgs<Logit, T> args{};
  args.batch = 2, args.time = 3, args.vocab = vocab, args.num_ids = 1;
  args.stride_batch = stride_batch, args.stride_time = stride;
  args.logits = logits.data();
  args.ids = ids.data();
  args.transform.temperature = T(0.8), args.transform.softcap = infinity<T>(), args.transform.logit_scale = 1;
  args.grad_stride_batch = 3 * vocab, args.grad_stride_time = vocab;
  std::vector<char> scratch(cuda::token_logprobs_scratch_bytes(args), '\xff');
  const auto out = under_all_schedules(what, [&] {
    std::vector<T> result(4 * rows, static_cast<T>(std::nan("")));
    args.logp = result.data(), args.entropy = args.logp + rows;
    args.lse = args.entropy + rows, args.lse_rest = args.lse + rows;
    cuda::token_logprobs(args, scratch.data(), nullptr);
    return result;
  });
  std::vector<T> saved = out;
  args.entropy = saved.data() + rows, args.lse = args.entropy + rows, args.lse_rest = args.lse + rows;
  args.grad_logp = grad_logp.data(), args.grad_entropy = grad_entropy.data();
  const auto grads = under_all_schedules(what + " backward", [&] {
    std::vector<Logit> grad(rows * vocab, narrow<Logit>(static_cast<T>(std::nan(""))));
    args.grad_logits = grad.data();
    cuda::token_logprobs_backward(args, nullptr);
    return grad;
  });
  const Truth truth = plain_truth(args);
  expect_close(std::vector<T>(out.begin(), out.begin() + 3 * rows), truth.stats, tolerance_of<T>(), what);
  expect_close(widened(grads), truth.grad, sizeof(Logit) == 2 ? 4e-3 : tolerance_of<T>(), what + " backward");
}

template <class Logit, class T>
void check_all_logprobs() {
  for (const auto& [vocab, gap] :
       {std::pair<int64_t, int64_t>{1, 0}, {7, 0}, {64, 0}, {333, 1}, {1000, 3}, {4099, 0}, {6500, 3}, {13001, 1}})
    check_logprobs<Logit, T>(vocab, gap);
}

// Everything that can be asked of a row: six ids (one twice, one ignored), softcap, keep mask, every output, and the
// gradient of all of them in the logits' own memory. One row of a long vocabulary is shared by several blocks when
// three ids or fewer are given.
template <class Logit, class T>
struct Everything {
  int64_t rows, vocab, count;
  std::vector<Logit> logits;
  std::vector<int64_t> ids;
  std::unique_ptr<bool[]> keep;
  T softcap = 5, scale = T(0.9), temperature = T(0.8), up[4] = {T(0.7), T(-0.4), T(0.3), T(0.2)};

  Everything(int64_t rows, int64_t vocab, int64_t count)
      : rows(rows),
        vocab(vocab),
        count(count),
        logits(random_logits<Logit, T>(rows * vocab)),
        keep(new bool[rows * vocab]) {
    for (int64_t i = 0; i < rows * vocab; ++i) keep[i] = i * 7 % 5 != 0;
    for (int64_t i = 0; i < rows * count; ++i) {
      ids.push_back(i % count == 1 ? ids.back() : i % count == 2 ? kIgnoredId : (i * 3571 + 6) % vocab);
      if (ids.back() >= 0) keep[i / count * vocab + ids.back()] = true;
    }
  }
  LogprobArgs<Logit, T> args(const Logit* at) const {
    LogprobArgs<Logit, T> args{};
    args.batch = 1, args.time = rows, args.vocab = vocab, args.num_ids = count;
    args.stride_batch = args.grad_stride_batch = rows * vocab, args.stride_time = args.grad_stride_time = vocab;
    args.logits = at;
    args.ids = ids.data();
    args.transform = {temperature, softcap, scale, nullptr, keep.get(), rows * vocab, vocab};
    return args;
  }
  double y(int64_t row, int64_t v) const {
    const double x = widen(logits[row * vocab + v]);
    return keep[row * vocab + v] && x > -INFINITY ? softcap * std::tanh(x * scale / softcap) : -INFINITY;
  }
};

// Per row: entropy, lse, log_sum_sq_probs, mean_logit, max_prob; per id: logp, is_top1, rank.
template <class Logit, class T>
std::vector<T> run_everything(const Everything<Logit, T>& given) {
  const int64_t rows = given.rows, count = given.count;
  std::vector<T> out((5 + 3 * count) * rows, static_cast<T>(std::nan("")));
  std::unique_ptr<bool[]> top(new bool[rows * count]);
  std::vector<int64_t> rank(rows * count);
  LogprobArgs<Logit, T> args = given.args(given.logits.data());
  args.entropy = out.data(), args.lse = args.entropy + rows, args.log_sum_sq_probs = args.lse + rows;
  std::vector<T> rest(rows, static_cast<T>(std::nan("")));
  args.lse_rest = rest.data();
  args.mean_logit = args.log_sum_sq_probs + rows, args.max_prob = args.mean_logit + rows,
  args.logp = args.max_prob + rows;
  args.is_top1 = top.get(), args.rank = rank.data();
  std::vector<char> scratch(cuda::token_logprobs_scratch_bytes(args), '\xff');
  cuda::token_logprobs(args, scratch.data(), nullptr);
  for (int64_t i = 0; i < rows * count; ++i) {
    out[(5 + count) * rows + i] = top[i];
    out[(5 + 2 * count) * rows + i] = static_cast<T>(rank[i]);
  }
  return out;
}

template <class Logit, class T>
std::vector<double> true_statistics(const Everything<Logit, T>& given) {
  const int64_t rows = given.rows, count = given.count;
  std::vector<double> out((5 + 3 * count) * rows, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    const auto z = [&](int64_t v) { return given.y(i, v) / static_cast<double>(given.temperature); };
    double sum = 0, total = 0, highest = -INFINITY, squares = 0, entropy = 0, kept = 0;
    for (int64_t v = 0; v < given.vocab; ++v) {
      sum += std::exp(z(v)), highest = std::fmax(highest, z(v));
      if (given.keep[i * given.vocab + v]) total += z(v), kept += 1;
    }
    const double lse = std::log(sum);
    for (int64_t v = 0; v < given.vocab; ++v) {
      const double p = std::exp(z(v) - lse);
      squares += p * p;
      if (p > 0) entropy -= p * (z(v) - lse);
    }
    const double per_row[] = {entropy, lse, std::log(squares), total / kept, std::exp(highest - lse)};
    for (int k = 0; k < 5; ++k) out[k * rows + i] = per_row[k];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = i * count + k, id = given.ids[at];
      if (id == kIgnoredId) continue;
      double above = 0, equal_before = 0;
      for (int64_t v = 0; v < given.vocab; ++v) {
        if (!given.keep[i * given.vocab + v]) continue;
        above += widen(given.logits[i * given.vocab + v]) > widen(given.logits[i * given.vocab + id]);
        equal_before += v < id && widen(given.logits[i * given.vocab + v]) == widen(given.logits[i * given.vocab + id]);
      }
      out[5 * rows + at] = z(id) - lse;
      out[(5 + count) * rows + at] = above == 0 && equal_before == 0;
      out[(5 + 2 * count) * rows + at] = above + 1;
    }
  }
  return out;
}

template <class Logit, class T>
std::vector<double> true_gradient(const Everything<Logit, T>& given, const std::vector<double>& stats) {
  std::vector<double> grad(given.rows * given.vocab, 0.0);
  for (int64_t i = 0; i < given.rows; ++i) {
    const double entropy = stats[i], lse = stats[given.rows + i], squares = stats[2 * given.rows + i];
    for (int64_t v = 0; v < given.vocab; ++v) {
      const double y = given.y(i, v), log_p = y / given.temperature - lse, p = std::exp(log_p), t = y / given.softcap;
      double g = given.up[2] * p + 2 * given.up[3] * (p * p * std::exp(-squares) - p);
      if (p > 0) g -= given.up[1] * p * (log_p + entropy);
      for (int64_t k = 0; k < given.count; ++k)
        if (given.ids[i * given.count + k] != kIgnoredId)
          g += given.up[0] * ((given.ids[i * given.count + k] == v) - p);
      grad[i * given.vocab + v] = p > 0 ? g * given.scale / given.temperature * (1 - t * t) : 0.0;
    }
  }
  return grad;
}

template <class Logit, class T>
void check_everything(int64_t rows, int64_t vocab, int64_t count) {
  const Everything<Logit, T> given(rows, vocab, count);
  const std::string what = "everything V=" + std::to_string(vocab) + " K=" + std::to_string(count) +
                           " bytes=" + std::to_string(sizeof(Logit));
  const std::vector<double> truth = true_statistics(given);
  const std::vector<T> out = under_all_schedules(what, [&] { return run_everything(given); });
  const auto part = [&](auto& all, int64_t from, int64_t to) {
    return std::decay_t<decltype(all)>(all.begin() + from, all.begin() + to);
  };
  const int64_t exact = (5 + count) * rows, end = (5 + 3 * count) * rows;
  expect_close(part(out, 0, exact), part(truth, 0, exact), tolerance_of<T>(), what);
  expect_close(part(out, exact, end), part(truth, exact, end), 0, what + " order");
  std::vector<T> saved(truth.begin(), truth.begin() + 3 * rows), zeros(rows, T(0)), up[4];
  for (int k = 0; k < 4; ++k) up[k].assign(k == 0 ? rows * count : rows, given.up[k]);
  const auto grads = under_all_schedules(what + " backward", [&] {
    std::vector<Logit> memory = given.logits;
    LogprobArgs<Logit, T> args = given.args(memory.data());
    args.entropy = saved.data(), args.lse = args.entropy + rows, args.log_sum_sq_probs = args.lse + rows;
    args.lse_rest = zeros.data();
    args.grad_logp = up[0].data(), args.grad_entropy = up[1].data(), args.grad_lse = up[2].data();
    args.grad_log_sum_sq_probs = up[3].data();
    args.grad_logits = memory.data();
    cuda::token_logprobs_backward(args, nullptr);
    return memory;
  });
  expect_close(widened(grads), true_gradient(given, truth), sizeof(Logit) == 2 ? 4e-3 : tolerance_of<T>(),
               what + " backward");
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_all_logprobs<float, float>();
  check_all_logprobs<double, double>();
  check_all_logprobs<BFloat16, float>();
  check_all_logprobs<Half, float>();
  for (const int64_t count : {1, 6}) {
    check_everything<float, float>(3, 1001, count);
    check_everything<BFloat16, float>(3, 1001, count);
  }
  check_everything<double, double>(2, 333, 6);
  // Threads of two warps have an id: the second may still read what the first overwrites in its next pass.
  check_everything<float, float>(1, 333, 40);
  check_everything<float, float>(1, 20011, 3);  // several blocks share the row
  std::printf("all as expected\n");
}
