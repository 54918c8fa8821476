// The Python module gradvac_kernels._cpu: addresses in, the GIL released. gradvac_kernels/ops.py has checked
// everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "gradvac/cpu.h"
#include "variants.h"

namespace py = pybind11;
using namespace gradvac;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Buffer buffer(Address data, int dtype, std::int64_t T, std::int64_t row_stride, Address bounds, std::int64_t K) {
  return {pointer<const void>(data), static_cast<Dtype>(dtype), T, row_stride, pointer<const std::int64_t>(bounds), K};
}

void gram(Address data, int dtype, std::int64_t T, std::int64_t row_stride, Address bounds, std::int64_t K, Address G,
          int threads) {
  cpu::gram(buffer(data, dtype, T, row_stride, bounds, K), pointer<double>(G), threads);
}

void cross_gram(Address a, int dtype, std::int64_t T, std::int64_t a_stride, Address bounds, std::int64_t K, Address b,
                std::int64_t U, std::int64_t b_stride, Address C, int threads) {
  cpu::cross_gram(buffer(a, dtype, T, a_stride, bounds, K), buffer(b, dtype, U, b_stride, bounds, K),
                  pointer<double>(C), threads);
}

void combine(Address data, int dtype, std::int64_t T, std::int64_t row_stride, Address bounds, std::int64_t K,
             Address weights, Address out, int out_dtype, int threads) {
  cpu::combine(buffer(data, dtype, T, row_stride, bounds, K), pointer<const double>(weights),
               {pointer<void>(out), static_cast<Dtype>(out_dtype)}, threads);
}

cpu::Vaccine vaccine(Address ema, std::int64_t N, double beta, double target, double max_target, double noise,
                     double smallest, double largest, Address task_ids, Address turnable, Address order,
                     std::int64_t seed, std::int64_t step, std::int64_t first_group, Address weights,
                     Address similarity, Address corrected) {
  return {pointer<double>(ema),
          N,
          target,
          {beta, max_target, {noise, smallest, largest}},
          pointer<const std::int64_t>(task_ids),
          pointer<const bool>(turnable),
          pointer<const std::int64_t>(order),
          seed,
          step,
          first_group,
          pointer<double>(weights),
          pointer<double>(similarity),
          pointer<bool>(corrected)};
}

void coefficients(Address G, std::int64_t K, std::int64_t T, Address ema, std::int64_t N, double beta, double target,
                  double max_target, double noise, double smallest, double largest, Address task_ids, Address turnable,
                  Address order, std::int64_t seed, std::int64_t step, std::int64_t first_group, Address weights,
                  Address similarity, Address corrected, int threads) {
  cpu::coefficients(pointer<const double>(G), K, T,
                    vaccine(ema, N, beta, target, max_target, noise, smallest, largest, task_ids, turnable, order, seed,
                            step, first_group, weights, similarity, corrected),
                    threads);
}

void vaccinate(Address data, int dtype, std::int64_t T, std::int64_t row_stride, Address bounds, std::int64_t K,
               Address ema, std::int64_t N, double beta, double target, double max_target, double noise,
               double smallest, double largest, Address task_ids, Address turnable, Address order, std::int64_t seed,
               std::int64_t step, std::int64_t first_group, Address weights, Address similarity, Address corrected,
               Address G, Address out, int out_dtype, int threads) {
  cpu::vaccinate(buffer(data, dtype, T, row_stride, bounds, K),
                 vaccine(ema, N, beta, target, max_target, noise, smallest, largest, task_ids, turnable, order, seed,
                         step, first_group, weights, similarity, corrected),
                 pointer<double>(G), {pointer<void>(out), static_cast<Dtype>(out_dtype)}, threads);
}

std::vector<std::string> instruction_sets() {
  int count = 0;
  const cpu::Variant* const* all = cpu::variants(&count);
  std::vector<std::string> names;
  for (int v = 0; v < count; ++v) {
    if (all[v]->supported()) names.emplace_back(all[v]->name);
  }
  return names;
}

void use(const std::string& name) {
  if (!cpu::use(name.c_str())) {
    std::string known;
    for (const std::string& supported : instruction_sets()) known += (known.empty() ? "" : ", ") + supported;
    throw py::value_error("GRADVAC_CPU_ISA: expected one of " + known + ", got '" + name + "'");
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels. Use them through gradvac_kernels.ops: addresses are not checked here.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("gram", &gram, unlocked);
  m.def("cross_gram", &cross_gram, unlocked);
  m.def("coefficients", &coefficients, unlocked);
  m.def("combine", &combine, unlocked);
  m.def("vaccinate", &vaccinate, unlocked);
  m.def(
      "streaming_read",
      [](Address data, std::int64_t bytes, int threads) {
        return cpu::streaming_read(pointer<const void>(data), bytes, threads);
      },
      unlocked);
  m.def("multiply_add_peak", &cpu::multiply_add_peak, unlocked);
  m.def("instruction_set", [] { return std::string(cpu::variant().name); });
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &use);
}
