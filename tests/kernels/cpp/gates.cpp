// Each gate's partials against central differences of its value, on a grid that stays away from the edges.
#include "check.h"
#include "gates/table.h"

using namespace tokenrl;

namespace {

constexpr double kStep = 1e-6;

// x and logp move together: d_logp is the derivative along both.
struct Point {
  double s, x, logp, advantage, t;
};

template <class Gate, class T = double>
Gated<T> at(const Point& point, const double* p) {
  const auto params = params_from<Gate, T>([=](size_t k) { return static_cast<T>(p[k]); });
  const T s = T(point.s), x = T(point.x), logp = T(point.logp), advantage = T(point.advantage);
  return Gate::template eval<T>({s, x, logp, advantage, position_power<Gate>(T(point.t), params)}, params);
}

// The unbiased KL forms carry the gradient of k2 = s^2 / 2, and some gates hold their weight fixed: their truth is not
// the value's slope in s.
template <class Gate>
double slope_in_s(const Point& point, const double* p) {
  if constexpr (std::is_same_v<Gate, KlK1Unbiased> || std::is_same_v<Gate, KlAbsUnbiased> ||
                std::is_same_v<Gate, KlK3Unbiased>)
    return point.s;
  if constexpr (std::is_same_v<Gate, Cispo>) return 0;
  Point below = point, above = point;
  below.s -= kStep, above.s += kStep;
  return (at<Gate>(above, p).value - at<Gate>(below, p).value) / (2 * kStep);
}

template <class Gate>
double slope_in_logp(const Point& point, const double* p) {
  Point below = point, above = point;
  below.logp -= kStep, below.x -= kStep, above.logp += kStep, above.x += kStep;
  return (at<Gate>(above, p).value - at<Gate>(below, p).value) / (2 * kStep);
}

template <class Gate>
void check_gate(const double* p) {
  for (double s : {-1.3, -0.41, -0.05, 0.033, 0.27, 0.9})
    for (double x : {-0.5, -0.02, 0.11, 0.6})
      for (double advantage : {-1.7, 0.0, 0.8})
        for (double t : {1.0, 3.0, 20.0}) {
          const Point point{s, x, -2.5, advantage, t};
          const Gated<double> g = at<Gate>(point, p);
          const std::string where = std::string(Gate::name) + " s=" + std::to_string(s) + " x=" + std::to_string(x) +
                                    " A=" + std::to_string(advantage);
          near(where + " d_s", g.d_s, slope_in_s<Gate>(point, p), 1e-7);
          near(where + " d_logp", g.d_logp, slope_in_logp<Gate>(point, p), 1e-7);
          // The same in float, as far as float can tell.
          const auto f = at<Gate, float>(point, p);
          near(where + " float value", f.value, g.value, 2e-6);
          near(where + " float d_s", f.d_s, g.d_s, 2e-6);
        }
}

}  // namespace

int main() {
  const double ppo[] = {0.2, 0.28, 1.5}, band[] = {0.1, 0.15, 0.3, 0.5}, other_power[] = {0.1, 0.15, 0.3, 0.37};
  const double bounds[] = {0.7, 1.2}, tau[] = {1.0, 1.05}, ceiling[] = {0.3};
  const double ntp[] = {0.2, 0.28, 1.5, 0.1}, dhpo[] = {0.3, 0.1, 0.15, 0.2, 0.25};
  const double hapo_high[] = {0.1, 0.15, 1.5, 0.6, 1.0, 0.5}, hapo_low[] = {0.1, 0.15, 1.5, -0.6, 1.0, 0.5};
  check_gate<Ratio>(nullptr);
  check_gate<PpoClip>(ppo);
  check_gate<PpoNtp>(ntp);
  check_gate<Dhpo>(dhpo);
  check_gate<DhpoBranch>(dhpo);
  check_gate<Hapo>(hapo_high);
  check_gate<Hapo>(hapo_low);
  check_gate<LogBand>(band);
  check_gate<LogBand>(other_power);
  check_gate<Cispo>(bounds);
  check_gate<Sapo>(tau);
  check_gate<KlK1>(nullptr);
  check_gate<KlAbs>(nullptr);
  check_gate<KlK2>(nullptr);
  check_gate<KlK3>(ceiling);
  check_gate<KlK1Unbiased>(nullptr);
  check_gate<KlAbsUnbiased>(nullptr);
  check_gate<KlK3Unbiased>(ceiling);
  check_gate<Identity>(nullptr);
  return report("gates");
}
