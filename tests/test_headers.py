"""The recurrence and the order are shared with device code: nvcc compiles them, and its host code agrees with ours."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_order import splitmix

import gradvac_kernels as gvk

INCLUDE = Path(__file__).parents[1] / "csrc" / "include"
PROGRAM = r"""
#include <cstdio>
#include "gradvac/order.h"
#include "gradvac/recurrence.h"
using namespace gradvac;

__global__ void on_device(double* out) {
  const Rule rule{0.5, 0.999, {1e-7, 1e-38, 1e38}};
  Row row(out[0]);
  const Meeting meeting = row.meet(out[1], Other(out[2], out[3], rule), rule);
  out[0] = meeting.a + moving_average(out[3], meeting.phi, 0.5);
  out[1] = static_cast<double>(order_key(order_state(1, 2, 3, 4), 5));
}

int main() {  // J = [[-4, 1, 1], [6, 1, 1]]: G = [[18, -22], [-22, 38]]
  const Rule rule{0.5, 0.999, {1e-7, 1e-38, 1e38}};
  Row row(18);
  const Meeting meeting = row.meet(-22, Other(38, 0.5, rule), rule);
  std::printf("%.17g %.17g %.17g\n", meeting.phi, meeting.a, row.n2);
  std::printf("%llu\n", static_cast<unsigned long long>(order_key(order_state(-5, 3, 10, 1), 2)));
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_device_code(tmp_path):
    source, program = tmp_path / "shared.cu", tmp_path / "shared"
    source.write_text(PROGRAM)
    subprocess.run(
        ["nvcc", "-std=c++17", "-arch=sm_80", "-Werror", "all-warnings", "-I", INCLUDE, source, "-o", program],
        check=True,
        timeout=300,
    )
    first, second = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    phi, a, n2 = map(float, first.split())
    grads, groups = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]), gvk.ParameterGroups.from_sizes({"all": 3})
    found = gvk.reference.vaccinate(grads, groups, None, target=0.5)
    assert phi == pytest.approx(float(found.similarity[0, 0, 1]), abs=1e-15)
    assert a == pytest.approx(float(found.weights[0, 1]) - 1, abs=1e-14)
    turned = grads[0].double() + a * grads[1].double()
    assert n2 == pytest.approx(float(turned @ turned), rel=1e-13)
    key = 0
    for value in (2**64 - 5, 3, 10, 1, 2):
        key = splitmix(key, value)
    assert int(second) == key >> 1
