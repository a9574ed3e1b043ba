// A check that prints what it compared, and the count that main returns.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

inline int failures = 0, checks = 0;

inline void near(const std::string& what, double found, double expected, double tolerance) {
  ++checks;
  if (std::fabs(found - expected) <= tolerance * (1 + std::fabs(expected))) return;
  ++failures;
  std::printf("FAILED %s: %.15g, expected %.15g\n", what.c_str(), found, expected);
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures || !checks;
}
