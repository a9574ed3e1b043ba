#include "objective_launch.cuh"

namespace tokenrl::cuda {

template size_t objective_scratch_bytes<float>(const Spans&);
template const char* objective(const ObjectiveArgs<float>&, Statistic, bool, const char*, void*, unsigned*, void*);

static const bool listed = list_objectives<float>(static_cast<TOKENRL_GATES*>(nullptr), "float");

}  // namespace tokenrl::cuda
