// The gradient of the logits: each is read once and written once, maybe in its own place.
#include "vocabulary.cuh"

namespace tokenrl::cuda {
namespace {

// The gradient of one logit without the ids' own shares; exactly 0 where p is.
template <class Logit, class T, class Mode>
struct GradientOf {
  const RowView<Logit, T, Mode>& row;
  RowGradient<T> weights;
  T lse, lse_rest;

  __device__ __forceinline__ GradientOf(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, Mode>& row)
      : row(row), weights(args, row.index), lse(args.lse[row.index]), lse_rest(args.lse_rest[row.index]) {}
  __device__ __forceinline__ T operator()(T x, int64_t v) const {
    const T y = row.capped(row.raw(x, v)), log_p = (row.transform.factor * y - lse) - lse_rest;
    const T p = power_of_two(log_p * kLog2E<T>);
    return p == 0 ? T(0) : weights.at(log_p, p) * row.slope(y);
  }
  __device__ __forceinline__ T own(T x, int64_t v, T grad_logp) const {
    return row.keeps(v) ? grad_logp * row.slope(row.capped(x)) : T(0);
  }
};

// p = 2^t unit at t = scale y - anchor, where z is y times a factor: one fma per logit. What rounding took of the
// anchor is `rest`, a number of the row like all that weighs p.
template <class T>
struct PowerOfRow {
  T scale, anchor, rest, unit;

  __device__ __forceinline__ PowerOfRow(T factor, T lse, T lse_rest) : scale(factor * kLog2E<T>) {
    const T base = lse / factor, base_rest = (::fma(-factor, base, lse) + lse_rest) / factor;
    anchor = scale * base;
    rest = ::fma(scale, base, -anchor) + scale * base_rest;
    unit = power_of_two(-rest);
  }
};

// The gradient out of such powers where `holds`, of log-probs and lse alone; exactly 0 where p is.
template <class T>
struct Proportional {
  T scale, anchor, constant;
  bool holds;

  __device__ __forceinline__ Proportional(const RowGradient<T>& weights, T factor, const PowerOfRow<T>& power)
      : scale(power.scale), anchor(power.anchor), constant(weights.constant * factor * power.unit) {
    holds = is_near(scale, anchor) && ::fabs(constant) < T(1e30);
  }
  __device__ __forceinline__ T operator()(T y) const { return power_of_two(::fma(scale, y, -anchor)) * constant; }
};

// And of the entropy and the sum of squares.
template <class T>
struct Curved {
  T scale, anchor, constant, slope, square;
  bool holds;

  __device__ __forceinline__ Curved(const RowGradient<T>& weights, T factor, const PowerOfRow<T>& power)
      : scale(power.scale), anchor(power.anchor) {
    const T unit = factor * power.unit;
    slope = unit * weights.slope / kLog2E<T>;
    constant = unit * weights.constant - slope * power.rest;
    square = unit * weights.square * power.unit;
    holds = is_near(scale, anchor) && ::fabs(constant) + ::fabs(slope) + ::fabs(square) < T(1e30);
  }
  __device__ __forceinline__ T operator()(T y) const {
    const T t = ::fmax(::fma(scale, y, -anchor), kNoPower<T>), p = power_of_two(t);
    return p * (square * p + (slope * t + constant));
  }
};

// Which of the gradients [begin, end) are written how: whole packs from `head` on, single ones before and behind them.
struct Places {
  int64_t begin, head, end;
};
// Who writes that of v.
template <class Who, class Logit>
__device__ __forceinline__ unsigned thread_of(const Places& places, int64_t v) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t tail = places.end - (places.end - places.head) % kPack;
  const int64_t turn = v < places.head ? v - places.begin : v < tail ? (v - places.head) / kPack : v - tail;
  return static_cast<unsigned>(turn % Who::count);
}

// One id per row: the thread that writes its place works its whole gradient out before, and writes it afterwards.
template <class T, template <class> class Shape, class Reads = BlockReads>
struct OneId : Plain {
  using Who = Reads;
  static constexpr int blocks = sizeof(T) == 8 ? 1 : 3;  // fp64 would spill in the registers of two

  template <class Logit>
  struct Gradient {
    const GradientOf<Logit, T, OneId> careful;
    const Shape<T> quick;
    int64_t id;
    T share, own;

    __device__ __forceinline__ Gradient(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, OneId>& row)
        : careful(args, row),
          quick(careful.weights, row.transform.factor, {row.transform.factor, careful.lse, careful.lse_rest}),
          id(args.ids[row.index]),
          share(RowGradient<T>::own_gradient(args, row.index, 0) * row.transform.factor) {}
    __device__ __forceinline__ bool by_packs() const { return quick.holds; }
    __device__ __forceinline__ T in_pack(T y, int64_t) const { return quick(y); }
    __device__ __forceinline__ T operator()(T y, int64_t v) const { return quick.holds ? quick(y) : careful(y, v); }
    __device__ __forceinline__ void start(const Places& places) {
      const bool mine = id >= places.begin && id < places.end && Who::rank() == thread_of<Who, Logit>(places, id);
      if (mine) own = careful(careful.row.raw(id), id) + share;  // 1 - p of a sure token
      else id = kIgnoredId;
    }
    __device__ __forceinline__ void finish(Logit* out) const {
      if (id >= 0) out[id] = narrow<Logit>(own);
    }
  };
};

// Any number of ids: their whole gradients are worked out before anything is written, and written after everything
// else.
template <class T>
struct ManyIds : Transformed {
  static constexpr int blocks = sizeof(T) == 8 ? 1 : kBlocksAtOnce;

  template <class Logit>
  struct Gradient {
    const LogprobArgs<Logit, T>& args;
    const GradientOf<Logit, T, ManyIds> careful;
    const int64_t* ids;
    T* own;
    int64_t begin, end;

    __device__ __forceinline__ Gradient(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, ManyIds>& row)
        : args(args), careful(args, row), ids(args.ids + row.index * args.num_ids) {
      TRL_DYNAMIC_SHARED(T, memory);
      own = memory;
    }
    __device__ __forceinline__ bool by_packs() const { return true; }
    __device__ __forceinline__ T in_pack(T x, int64_t v) const { return careful(x, v); }
    __device__ __forceinline__ T operator()(T x, int64_t v) const { return careful(x, v); }
    __device__ __forceinline__ void start(const Places& places) {
      begin = places.begin, end = places.end;
      for (int64_t k = threadIdx.x; k < args.num_ids; k += kThreads) {
        if (ids[k] < begin || ids[k] >= end) continue;
        T share = 0;
        for (int64_t j = 0; j < args.num_ids; ++j)
          if (ids[j] == ids[k]) share += RowGradient<T>::own_gradient(args, careful.row.index, j);
        const T x = widen(careful.row.logits[ids[k]]);
        own[k] = careful(x, ids[k]) + careful.own(x, ids[k], share);
      }
      __syncthreads();  // the logits may now be overwritten
    }
    __device__ __forceinline__ void finish(Logit* out) const {
      __syncthreads();  // after everybody's write
      for (int64_t k = threadIdx.x; k < args.num_ids; k += kThreads)
        if (ids[k] >= begin && ids[k] < end) out[ids[k]] = narrow<Logit>(own[k]);
    }
  };
};

template <class Who, class Logit>
__device__ __forceinline__ void write_zeros(Logit* out, int64_t begin, int64_t end) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t head = begin + elements_to_alignment(out + begin, end - begin), packs = (end - head) / kPack;
  for (int64_t v = begin + Who::rank(); v < head; v += Who::count) out[v] = Logit{};
  for (int64_t p = Who::rank(); p < packs; p += Who::count)
    reinterpret_cast<Pack<Logit>*>(out + head)[p] = Pack<Logit>{};
  for (int64_t v = head + packs * kPack + Who::rank(); v < end; v += Who::count) out[v] = Logit{};
}

// Writes the gradients [begin, end) of a row.
template <class Mode, class Logit, class T>
__device__ __forceinline__ void write_gradients(const LogprobArgs<Logit, T>& args, int64_t index, int64_t begin,
                                                int64_t end) {
  using Who = typename Mode::Who;
  constexpr int kPack = Pack<Logit>::size;
  const RowView<Logit, T, Mode> row(args, index);
  Logit* out = args.grad_logits + row.grad_offset;
  if (RowGradient<T>::is_zero(args, index)) return write_zeros<Who>(out, begin, end);
  typename Mode::template Gradient<Logit> gradient(args, row);
  const int64_t head = begin + elements_to_alignment(row.logits + begin, end - begin);
  // One by one in a strided view whose rows lie otherwise than those of its gradient, too.
  const Places places{begin, gradient.by_packs() && is_aligned(out + head) ? head : end, end};
  gradient.start(places);
  const auto single = [&](int64_t v) { out[v] = narrow<Logit>(gradient(static_cast<T>(widen(row.logits[v])), v)); };
  for (int64_t v = begin + Who::rank(); v < places.head; v += Who::count) single(v);
  const auto visit = [&](const auto& packs, int64_t first) {
    constexpr int kCount = sizeof packs / sizeof(Logit);
    T grad[kCount];
    widen_packs(packs, grad);
#pragma unroll
    for (int k = 0; k < kCount; ++k) grad[k] = gradient.in_pack(grad[k], index_in<Who, Logit>(first, k));
#pragma unroll
    for (int k = 0; k < kCount; k += kPack)
      store_pack(out + index_in<Who, Logit>(first, k), narrow_pack<Logit>(grad + k));
  };
  for_whole_packs<Aligned, Who>(row.logits, places.head, (end - places.head) / kPack, visit);
  for_tail<Who, Logit>(places.head, end, single);
  gradient.finish(out);
}

template <class Logit, class T, class Mode>
__global__ void __launch_bounds__(kThreads, Mode::blocks)
    logprobs_backward_kernel(LogprobArgs<Logit, T> args, int splits) {
  const int64_t index = blockIdx.x / static_cast<unsigned>(splits), split = blockIdx.x - index * splits;
  const int64_t length = (args.vocab + splits - 1) / splits;
  const int64_t begin = smaller(split * length, args.vocab), end = smaller(begin + length, args.vocab);
  write_gradients<Mode>(args, index, begin, end);
}

// A warp per row, whatever of Curved its gradient asks for: the memory is what limits either.
template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, OneId<T, Curved>::blocks)
    short_rows_backward_kernel(LogprobArgs<Logit, T> args) {
  const int64_t index = row_of_warp();
  if (index < args.batch * args.time) write_gradients<OneId<T, Curved, WarpReads>>(args, index, 0, args.vocab);
}

template <class Logit, class T>
bool list_backward(const std::string& type) {
  if constexpr (sizeof(T) == 4)
    list_kernel("token_logprobs_backward " + type + " short rows", &short_rows_backward_kernel<Logit, T>);
  return list_kernel("token_logprobs_backward " + type, &logprobs_backward_kernel<Logit, T, OneId<T, Proportional>>) &&
         list_kernel("token_logprobs_backward " + type + " entropy",
                     &logprobs_backward_kernel<Logit, T, OneId<T, Curved>>) &&
         list_kernel("token_logprobs_backward " + type + " many ids", &logprobs_backward_kernel<Logit, T, ManyIds<T>>);
}
const bool listed = list_backward<float, float>("float") && list_backward<double, double>("double") &&
                    list_backward<BFloat16, float>("bfloat16") && list_backward<Half, float>("half");

}  // namespace

template <class Logit, class T>
const char* token_logprobs_backward(const LogprobArgs<Logit, T>& args, void* stream) {
  if (args.batch * args.time * args.vocab == 0) return nullptr;
  const int splits = static_cast<int>(blocks_per_row(args.batch * args.time, args.vocab));
  const int64_t blocks = args.batch * args.time * splits;
  if (args.num_ids == 1 && !args.transform.keep && args.transform.softcap == infinity<T>()) {
    if constexpr (sizeof(T) == 4) {
      if (is_short(args)) {
        const int64_t of_warps = blocks_of_warps(args.batch * args.time);
        TRL_LAUNCH((short_rows_backward_kernel<Logit, T>), of_warps, kThreads, 0, stream, args);
        return launch_error();
      }
    }
    if (args.grad_entropy || args.grad_log_sum_sq_probs)
      TRL_LAUNCH((logprobs_backward_kernel<Logit, T, OneId<T, Curved>>), blocks, kThreads, 0, stream, args, splits);
    else
      TRL_LAUNCH((logprobs_backward_kernel<Logit, T, OneId<T, Proportional>>), blocks, kThreads, 0, stream, args,
                 splits);
    return launch_error();
  }
  const size_t shared = sizeof(T) * static_cast<size_t>(args.num_ids);
  if (shared > 48 << 10) return "more ids per row than shared memory holds: at most 12288 (6144 in float64)";
  TRL_LAUNCH((logprobs_backward_kernel<Logit, T, ManyIds<T>>), blocks, kThreads, shared, stream, args, splits);
  return launch_error();
}

template const char* token_logprobs_backward(const LogprobArgs<float, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<double, double>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<BFloat16, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<Half, float>&, void*);

}  // namespace tokenrl::cuda
