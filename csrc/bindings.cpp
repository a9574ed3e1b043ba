// tokenrl._bindings: what an op cannot tell Python. It is linked to the op library, which knows its kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "divergences.h"
#include "gates/table.h"
#include "introspection.h"
#include "links.h"
#include "statistics.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const std::string version = TOKENRL_CUDA_VERSION, architectures = TOKENRL_CUDA_ARCHITECTURES, isas = TOKENRL_ISAS;
  py::dict info;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = py::str(isas).attr("split")();
  info["instruction_set"] = tokenrl_instruction_set();
  info["cuda"] = version.empty() ? py::object(py::none()) : py::str(version);
  info["cuda_architectures"] = py::str(architectures).attr("split")();
  return info;
}

// (name, names of the parameters) of each functor.
template <class... Functor>
std::vector<std::pair<std::string, py::list>> table_of(std::tuple<Functor...>*) {
  const auto names = [](const char* listed) { return py::str(listed).attr("replace")(",", "").attr("split")(); };
  return {{Functor::name, names(Functor::param_names)}...};
}

std::vector<py::dict> kernel_attributes() {
  std::vector<py::dict> kernels;
#ifdef TOKENRL_WITH_CUDA
  const char* error = tokenrl_kernel_attributes(
      [](void* context, const TokenrlKernel& kernel) {
        py::dict row;
        row["name"] = kernel.name;
        row["threads"] = kernel.threads;
        row["registers"] = kernel.registers;
        row["shared_bytes"] = kernel.shared_bytes;
        row["local_bytes"] = kernel.local_bytes;
        row["blocks_per_multiprocessor"] = kernel.blocks_per_multiprocessor;
        static_cast<std::vector<py::dict>*>(context)->push_back(row);
      },
      &kernels);
  if (error) throw std::runtime_error(std::string("kernel_attributes: ") + error);
#else
  throw std::runtime_error("kernel_attributes: built without CUDA (no nvcc was found, or TOKENRL_CUDA=0)");
#endif
  return kernels;
}

// measure(size, threads) without the interpreter's lock, once both are known to be positive.
template <double (*measure)(int64_t, int)>
double measured(int64_t size, int threads) {
  if (size < 1 || threads < 1) throw py::value_error("size, threads: accepted: positive integers");
  py::gil_scoped_release unlocked;
  return measure(size, threads);
}

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.doc() =
      "Build information, the tables of gates, divergences, links and scores and the attributes of the CUDA kernels.";
  m.def("build_info", &build_info,
        "Compiler, instruction sets built and the one in use, CUDA version (None without) and its architectures.");
  m.def(
      "gates", [] { return table_of(static_cast<tokenrl::Gates*>(nullptr)); },
      "(name, names of the parameters) of each gate.");
  m.def(
      "divergences", [] { return table_of(static_cast<tokenrl::Divergences*>(nullptr)); },
      "(name, names of the parameters) of each divergence.");
  m.def(
      "links", [] { return table_of(static_cast<tokenrl::Links*>(nullptr)); },
      "(name, names of the parameters) of each link of preferences.");
  m.def(
      "scores", [] { return table_of(static_cast<tokenrl::Scores*>(nullptr)); },
      "(name, names of the parameters) of each score of preferences.");
  m.def(
      "statistics",
      [] { return std::vector<std::string>(std::begin(tokenrl::kStatistics), std::end(tokenrl::kStatistics)); },
      "The names of the statistics.");
  m.def("kernel_attributes", &kernel_attributes,
        "Registers, shared and local memory and occupancy of each CUDA kernel on the current device; RuntimeError with "
        "the reason where there is none.");
  m.def("measure_read", &measured<tokenrl_measure_read>, py::arg("bytes"), py::arg("threads"),
        "Bytes per second that the CPU reads from a buffer of so many bytes.");
  m.def("measure_copy", &measured<tokenrl_measure_copy>, py::arg("bytes"), py::arg("threads"),
        "Bytes per second, read plus written, of copying a buffer of so many bytes.");
  m.def("measure_exponentials", &measured<tokenrl_measure_exponentials>, py::arg("count"), py::arg("threads"),
        "Exponentials per second of the kernels' own e^x, on values that stay in the first-level cache.");
}
