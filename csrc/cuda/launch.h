// What ops.cpp calls to run a kernel: one launcher per op, over the argument structs of csrc/kernels.h. Pointers are to
// device memory, `stream` is a cudaStream_t. Scratch is device memory of the given size, aligned to 16 bytes, with any
// contents. A ticket is 0, and 0 again when the launch is over: the kernels of a stream, one after another, need no
// second one. Each launcher returns null, or the error's text.
#pragma once

#include <cstddef>

#include "../kernels.h"
#include "../statistics.h"
#include "../vocabulary.h"

namespace tokenrl::cuda {

template <class T>
size_t objective_scratch_bytes(const Spans& spans);
template <class T>
const char* objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate, void* scratch,
                      unsigned* ticket, void* stream);

// adjoint: the true one (flow "through"). For flow "local" and for the minima, whose adjoints are the mask, ask for the
// statistic `token` of the gradient.
template <class T>
size_t statistic_scratch_bytes(const StatisticArgs<T>& args);
template <class T>
const char* statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, void* scratch, void* stream);

template <class T>
const char* position_adaptive_clip(const ClipArgs<T>& args, void* stream);

size_t aggregation_weights_scratch_bytes(int64_t num_sequences);
const char* aggregation_weights(const WeightArgs& args, Span span, Unit unit, void* scratch, unsigned* ticket,
                                void* stream);

// Logit, T: float, float; double, double; BFloat16, float; Half, float.
template <class Logit, class T>
size_t token_logprobs_scratch_bytes(const LogprobArgs<Logit, T>& args);
template <class Logit, class T>
const char* token_logprobs(const LogprobArgs<Logit, T>& args, void* scratch, void* stream);
template <class Logit, class T>
const char* token_logprobs_backward(const LogprobArgs<Logit, T>& args, void* stream);

template <class Logit, class T>
size_t divergence_scratch_bytes(const DivergenceArgs<Logit, T>& args);
template <class Logit, class T>
const char* divergence(const DivergenceArgs<Logit, T>& args, const char* kind, void* scratch, void* stream);
template <class Logit, class T>
const char* divergence_backward(const DivergenceArgs<Logit, T>& args, const char* kind, void* stream);

// The ticket of a stream of the current device. Null where it has none: there are many streams, or its launches are
// being recorded into a graph, which may run on any stream.
unsigned* ticket_of(int device, void* stream);

}  // namespace tokenrl::cuda
