// Each gate's partials against central differences of its value, on a grid that stays away from the edges.
#include "check.h"
#include "gates.h"

using namespace tokenrl;

namespace {

constexpr double kStep = 1e-6;

template <class Gate>
double value(double s, double logp, double advantage, double t, const double* p) {
  return Gate::template eval<double>({s, logp, advantage, position_power<Gate>(t, p), p}).value;
}

// The unbiased KL forms carry the gradient of k2 = s^2 / 2, and cispo holds its weight fixed: their truth is not the
// value's slope in s.
template <class Gate>
double slope_in_s(double s, double logp, double advantage, double t, const double* p) {
  if constexpr (std::is_same_v<Gate, KlK1Unbiased> || std::is_same_v<Gate, KlK3Unbiased>) return s;
  if constexpr (std::is_same_v<Gate, Cispo>) return 0;
  return (value<Gate>(s + kStep, logp, advantage, t, p) - value<Gate>(s - kStep, logp, advantage, t, p)) / (2 * kStep);
}

template <class Gate>
void check_gate(const double* p) {
  for (double s : {-1.3, -0.41, -0.05, 0.033, 0.27, 0.9})
    for (double advantage : {-1.7, 0.0, 0.8})
      for (double t : {1.0, 3.0, 20.0}) {
        const double logp = -2.5;
        const Gated<double> g = Gate::template eval<double>({s, logp, advantage, position_power<Gate>(t, p), p});
        const double in_logp =
            (value<Gate>(s, logp + kStep, advantage, t, p) - value<Gate>(s, logp - kStep, advantage, t, p)) /
            (2 * kStep);
        const std::string where =
            std::string(Gate::name) + " s=" + std::to_string(s) + " A=" + std::to_string(advantage);
        near(where + " d_s", g.d_s, slope_in_s<Gate>(s, logp, advantage, t, p), 1e-7);
        near(where + " d_logp", g.d_logp, in_logp, 1e-7);
        // The same in float, as far as float can tell.
        float narrow[kMaxParams];
        for (int k = 0; k < Gate::num_params; ++k) narrow[k] = static_cast<float>(p[k]);
        const auto f = Gate::template eval<float>(
            {float(s), float(logp), float(advantage), position_power<Gate>(float(t), narrow), narrow});
        near(where + " float value", f.value, g.value, 2e-6);
        near(where + " float d_s", f.d_s, g.d_s, 2e-6);
      }
}

}  // namespace

int main() {
  const double ppo[] = {0.2, 0.28, 1.5}, band[] = {0.1, 0.15, 0.3, 0.5}, other_power[] = {0.1, 0.15, 0.3, 0.37};
  const double bounds[] = {0.7, 1.2}, tau[] = {1.0, 1.05}, ceiling[] = {0.3};
  check_gate<PpoClip>(ppo);
  check_gate<LogBand>(band);
  check_gate<LogBand>(other_power);
  check_gate<Cispo>(bounds);
  check_gate<Sapo>(tau);
  check_gate<KlK1>(nullptr);
  check_gate<KlK2>(nullptr);
  check_gate<KlK3>(ceiling);
  check_gate<KlK1Unbiased>(nullptr);
  check_gate<KlK3Unbiased>(ceiling);
  check_gate<Identity>(nullptr);
  return report("gates");
}
