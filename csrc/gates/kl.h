// Estimators of KL(pi || ref) as gates (tokenrl/objectives/gates/kl.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct KlK1 : AnyPosition {
  static constexpr const char* name = "kl_k1";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = in.s;
    out.d_s = 1;
    return out;
  }
};

struct KlAbs : AnyPosition {
  static constexpr const char* name = "kl_abs";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = larger(in.s, -in.s);
    out.d_s = static_cast<T>((in.s > 0) - (in.s < 0));
    return out;
  }
};

struct KlK2 : AnyPosition {
  static constexpr const char* name = "kl_k2";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = in.s * in.s / 2;
    out.d_s = in.s;
    return out;
  }
};

struct KlK3 : AnyPosition {
  static constexpr const char* name = "kl_k3";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    const T k3 = excess(-in.s);
    out.value = smaller(k3, in.p[0]);
    out.d_s = k3 > in.p[0] ? T(0) : in.s - k3;
    return out;
  }
};

struct KlK1Unbiased : AnyPosition {
  static constexpr const char* name = "kl_k1_unbiased";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK1::eval(in);
    out.d_s = in.s;
    return out;
  }
};

struct KlAbsUnbiased : AnyPosition {
  static constexpr const char* name = "kl_abs_unbiased";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlAbs::eval(in);
    out.d_s = in.s;
    return out;
  }
};

struct KlK3Unbiased : AnyPosition {
  static constexpr const char* name = "kl_k3_unbiased";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK3::eval(in);
    out.d_s = in.s;
    return out;
  }
};

}  // namespace tokenrl
