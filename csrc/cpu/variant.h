// One variant's table. Each variant_*.cpp sets GRADVAC_VARIANT, GRADVAC_SUPPORTED, perhaps GRADVAC_SLOW, and includes
// this.
#include "ceilings.h"
#include "combine.h"
#include "cross_gram.h"
#include "gram.h"
#include "variants.h"

#ifndef GRADVAC_SLOW
#define GRADVAC_SLOW false
#endif
#define GRADVAC_TEXT_OF(name) #name
#define GRADVAC_TEXT(name) GRADVAC_TEXT_OF(name)

namespace gradvac::cpu::GRADVAC_VARIANT {

static bool supported() { return GRADVAC_SUPPORTED; }
static bool slow() { return GRADVAC_SLOW; }

using Float32Ways = Ways<float, InDoubles<float>, InDoubles<double>, InFloats<float>, InFloats<float>>;
using Bfloat16Ways = Ways<Bfloat16, InFloats<Bfloat16>, InFloats<Bfloat16>, InFloats<Bfloat16>, InFloats<Bfloat16>>;
using Float16Ways = Ways<Float16, InFloats<Float16>, InFloats<float>, void, InFloats<float>>;
using Float64Ways = Ways<double, InDoubles<double>, InDoubles<double>, InDoubles<double>, InDoubles<double>>;

extern const Solver solver;
extern const Variant table;
const Variant table = {
    GRADVAC_TEXT(GRADVAC_VARIANT),
    supported,
    slow,
    gram_scratch,
    {gram<Float32Ways>, gram<Bfloat16Ways>, gram<Float16Ways>, gram<Float64Ways>},
    cross_gram_scratch,
    {cross_gram<Float32Ways>, cross_gram<Bfloat16Ways>, cross_gram<Float16Ways>, cross_gram<Float64Ways>},
    {combine<float>, combine<Bfloat16>, combine<Float16>, combine<double>},
    &solver,
    read_all,
    multiply_add,
};

}  // namespace gradvac::cpu::GRADVAC_VARIANT
