// Estimators of KL(pi || ref) as gates (tokenrl/objectives/gates/kl.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct KlK1 : NoParams {
  static constexpr const char* name = "kl_k1";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>&) {
    Gated<T> out;
    out.value = in.s;
    out.d_s = 1;
    return out;
  }
};

struct KlAbs : NoParams {
  static constexpr const char* name = "kl_abs";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>&) {
    Gated<T> out;
    out.value = larger(in.s, -in.s);
    out.d_s = static_cast<T>((in.s > 0) - (in.s < 0));
    return out;
  }
};

struct KlK2 : NoParams {
  static constexpr const char* name = "kl_k2";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>&) {
    Gated<T> out;
    out.value = in.s * in.s / 2;
    out.d_s = in.s;
    return out;
  }
};

struct KlK3 : AnyPosition {
  static constexpr const char* name = "kl_k3";
  TRL_PARAMS(ceiling);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out;
    const T k3 = excess(-in.s);
    out.value = smaller(k3, params.ceiling);
    out.d_s = k3 > params.ceiling ? T(0) : in.s - k3;
    return out;
  }
};

struct KlK1Unbiased : NoParams {
  static constexpr const char* name = "kl_k1_unbiased";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& none) {
    Gated<T> out = KlK1::eval(in, none);
    out.d_s = in.s;
    return out;
  }
};

struct KlAbsUnbiased : NoParams {
  static constexpr const char* name = "kl_abs_unbiased";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& none) {
    Gated<T> out = KlAbs::eval(in, none);
    out.d_s = in.s;
    return out;
  }
};

struct KlK3Unbiased : KlK3 {
  static constexpr const char* name = "kl_k3_unbiased";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out = KlK3::eval(in, params);
    out.d_s = in.s;
    return out;
  }
};

}  // namespace tokenrl
