#include "objective_launch.cuh"

namespace tokenrl::cuda {

template size_t objective_scratch_bytes<double>(const Spans&);
template const char* objective(const ObjectiveArgs<double>&, Statistic, bool, const char*, void*, unsigned*, void*);

static const bool listed = list_objectives<double>(static_cast<TOKENRL_GATES*>(nullptr), "double");

}  // namespace tokenrl::cuda
