// Algorithm 1 of Wang et al., "Gradient Vaccine" (ICLR 2021), in Gram space: one meeting of two tasks.
//
// Row i is g'_i = sum_j c_ij g_j, and all that is needed of it are v = G c_i and n2 = c_i' G c_i. Whoever runs the
// inner loop keeps c and v (a CPU in an array, a GPU across lanes) and, after each meeting, adds a to c_ij and a G[:,
// j] to v.
#pragma once

#include <math.h>

#include "gradvac/host_device.h"

namespace gradvac {

// What a squared norm must satisfy to be measured; see gradvac_kernels/numerics.py.
struct Limits {
  double noise, smallest, largest;

  // Neither zero nor non-finite (a NaN compares false).
  GRADVAC_HD bool usable(double square) const { return square >= smallest && square <= largest; }
};

struct Rule {
  double beta;        // weight of a new similarity in the moving average
  double max_target;  // cap of a target where it is used
  Limits limits;
};

struct Meeting {
  double phi = 0;  // the similarity, where measured
  double a = 0;    // how much of g_j was added to g'_i
  bool measured = false;
  bool turned = false;
};

struct Row {
  double n2;     // |g'_i|^2
  double added;  // sum_j |c_ij| |g_j|, the norms of all that was added up to make g'_i

  GRADVAC_HD explicit Row(double square) : n2(square), added(sqrt(square)) {}

  // Row i meets task j: v_j = <g'_i, g_j>, square_j = |g_j|^2, hat their similarity target.
  GRADVAC_HD Meeting meet(double v_j, double square_j, double hat, const Rule& rule) {
    Meeting meeting;
    const bool lost = !(n2 > rule.limits.noise * added * added);  // what is left of g'_i is rounding
    if (lost || !rule.limits.usable(square_j)) return meeting;
    const double length = sqrt(n2), norm_j = sqrt(square_j);
    const double cosine = v_j / sqrt(n2 * square_j);  // exactly -1 for g_j = -g'_i
    const double phi = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
    const double goal = hat > rule.max_target ? rule.max_target : hat;  // a NaN turns nothing
    const double sin_phi = sqrt((1 - phi) * (1 + phi)), sin_goal = sqrt((1 - goal) * (1 + goal));
    const double a = length * (goal * sin_phi - phi * sin_goal) / (norm_j * sin_goal);
    meeting.measured = true;
    meeting.phi = phi;
    meeting.turned = phi < goal;
    meeting.a = meeting.turned ? a : 0.0;  // no branch: which way it goes is anybody's guess
    n2 += 2 * meeting.a * v_j + (meeting.a * norm_j) * (meeting.a * norm_j);
    added += fabs(meeting.a) * norm_j;
    return meeting;
  }
};

// Eq. 3, always, outside the if, with the phi before the correction.
GRADVAC_HD inline double moving_average(double hat, double phi, double beta) { return (1 - beta) * hat + beta * phi; }

}  // namespace gradvac
