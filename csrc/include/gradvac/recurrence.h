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

// What of task j does not depend on g'_i.
struct Other {
  double square;  // |g_j|^2
  double norm;
  double goal, sin_goal;  // the similarity target, as it is used

  GRADVAC_HD Other(double square_, double hat, const Rule& rule)
      : square(square_), norm(sqrt(square_)), goal(goal_of(hat, rule)), sin_goal(sqrt((1 - goal) * (1 + goal))) {}
  GRADVAC_HD Other(double square_, double norm_, double hat, double sin_goal_, const Rule& rule)
      : square(square_), norm(norm_), goal(goal_of(hat, rule)), sin_goal(sin_goal_) {}

  // A NaN turns nothing.
  GRADVAC_HD static double goal_of(double hat, const Rule& rule) {
    return hat > rule.max_target ? rule.max_target : hat;
  }
};

struct Row {
  double n2;     // |g'_i|^2
  double added;  // sum_j |c_ij| |g_j|, the norms of all that was added up to make g'_i

  GRADVAC_HD explicit Row(double square) : n2(square), added(sqrt(square)) {}

  // Row i meets task j: v_j = <g'_i, g_j>.
  GRADVAC_HD Meeting meet(double v_j, const Other& j, const Rule& rule) {
    Meeting meeting;
    const bool lost = !(n2 > rule.limits.noise * added * added);  // what is left of g'_i is rounding
    if (lost || !rule.limits.usable(j.square)) return meeting;
    const double length = sqrt(n2);
    const double cosine = v_j / sqrt(n2 * j.square);  // exactly -1 for g_j = -g'_i
    const double phi = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
    const double sin_phi = sqrt((1 - phi) * (1 + phi));
    const double a = length * (j.goal * sin_phi - phi * j.sin_goal) / (j.norm * j.sin_goal);
    meeting.measured = true;
    meeting.phi = phi;
    meeting.turned = phi < j.goal;
    meeting.a = meeting.turned ? a : 0.0;  // no branch: which way it goes is anybody's guess
    n2 += 2 * meeting.a * v_j + (meeting.a * j.norm) * (meeting.a * j.norm);
    added += fabs(meeting.a) * j.norm;
    return meeting;
  }
};

// Eq. 3, always, outside the if, with the phi before the correction.
GRADVAC_HD inline double moving_average(double hat, double phi, double beta) { return (1 - beta) * hat + beta * phi; }

}  // namespace gradvac
