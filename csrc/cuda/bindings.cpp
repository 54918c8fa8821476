// The Python module gradvac_kernels._cuda: addresses on the device and a stream in. gradvac_kernels/ops.py has checked
// everything.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gradvac/cuda.h"

#ifdef GRADVAC_CUDA_HOST  // see platform.h
#include "cuda_host.h"
#define GRADVAC_MODULE _cuda_host
#else
#define GRADVAC_MODULE _cuda
#endif

namespace py = pybind11;
using namespace gradvac;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<Address>());
}

// The structs come as tuples, in the order of their members.

cuda::Buffer buffer(const py::tuple& t) {
  return {pointer<const void>(t[0]), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<std::int64_t>(),
          t[3].cast<std::int64_t>(), t[4].cast<bool>()};
}

cuda::Plan plan(const py::tuple& t) {
  return {t[0].cast<std::int64_t>(), pointer<const std::int64_t>(t[1]), pointer<const std::int64_t>(t[2]),
          t[3].cast<std::int64_t>(), pointer<const std::int64_t>(t[4]), t[5].cast<std::int64_t>()};
}

cuda::Scratch scratch(const py::tuple& t) {
  return {pointer<double>(t[0]), pointer<double>(t[1]), pointer<double>(t[2]), pointer<std::int32_t>(t[3])};
}

cuda::Result result(const py::tuple& t) {
  return {pointer<void>(t[0]), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<bool>()};
}

cuda::Vaccine vaccine(const py::tuple& t) {
  const auto number = [&](int i) { return t[i].cast<double>(); };
  const auto integer = [&](int i) { return t[i].cast<std::int64_t>(); };
  const auto ids = [&](int i) { return pointer<const std::int64_t>(t[i]); };
  return {pointer<double>(t[0]),
          integer(1),
          number(2),
          {number(3), number(4), {number(5), number(6), number(7)}},
          ids(8),
          ids(9),
          integer(10),
          ids(11),
          integer(12),
          integer(13),
          ids(14),
          integer(15),
          pointer<double>(t[16]),
          pointer<double>(t[17]),
          pointer<bool>(t[18])};
}

void check(cuda::Error error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda::describe(error));
}

}  // namespace

PYBIND11_MODULE(GRADVAC_MODULE, m) {
  m.doc() = "CUDA kernels. Use them through gradvac_kernels.ops: addresses are not checked here.";
  m.attr("RUN") = cuda::kRun;
  m.attr("TILE") = cuda::kTile;
  m.def("why_unavailable", [](int device) {
    const cuda::Error error = cuda::use_device(device);
    const cuda::Error found = error != 0 ? error : cuda::probe_device();
    return found == 0 ? std::string() : std::string(cuda::describe(found));
  });
  m.def("use_device", [](int device) { check(cuda::use_device(device)); });
  m.def("gram", [](const py::tuple& grads, const py::tuple& groups, const py::tuple& memory, const py::int_& G,
                   const py::int_& stream) {
    check(cuda::gram(buffer(grads), plan(groups), scratch(memory), pointer<double>(G), pointer<void>(stream)));
  });
  m.def("cross_gram", [](const py::tuple& a, const py::tuple& b, const py::tuple& groups, const py::int_& sums,
                         const py::int_& C, const py::int_& stream) {
    check(cuda::cross_gram(buffer(a), buffer(b), plan(groups), pointer<double>(sums), pointer<double>(C),
                           pointer<void>(stream)));
  });
  m.def("coefficients", [](const py::int_& G, std::int64_t K, std::int64_t T, const py::tuple& rule,
                           const py::tuple& memory, const py::int_& stream) {
    check(cuda::coefficients(pointer<const double>(G), K, T, vaccine(rule), scratch(memory), pointer<void>(stream)));
  });
  m.def("combine", [](const py::tuple& grads, const py::int_& weights, const py::tuple& groups, const py::tuple& out,
                      const py::int_& stream) {
    check(
        cuda::combine(buffer(grads), pointer<const double>(weights), plan(groups), result(out), pointer<void>(stream)));
  });
  m.def("vaccinate", [](const py::tuple& grads, const py::tuple& groups, const py::tuple& rule, const py::tuple& memory,
                        const py::int_& G, const py::tuple& out, bool one_launch, const py::int_& stream) {
    check(cuda::vaccinate(buffer(grads), plan(groups), vaccine(rule), scratch(memory), pointer<double>(G), result(out),
                          one_launch, pointer<void>(stream)));
  });
#ifdef GRADVAC_CUDA_HOST
  m.def("fuzz", &host::fuzz);
  m.def("set_residents", &host::set_residents);
  m.def("switches", &host::switches);
  m.def("launches", &host::launches);
#endif
}
