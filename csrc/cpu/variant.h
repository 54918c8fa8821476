// One variant's table. Each variant_*.cpp sets GRADVAC_VARIANT and GRADVAC_SUPPORTED and includes this.
#include "ceilings.h"
#include "combine.h"
#include "gram.h"
#include "variants.h"

#define GRADVAC_TEXT_OF(name) #name
#define GRADVAC_TEXT(name) GRADVAC_TEXT_OF(name)

namespace gradvac::cpu::GRADVAC_VARIANT {

static bool supported() { return GRADVAC_SUPPORTED; }

extern const Variant table;
const Variant table = {
    GRADVAC_TEXT(GRADVAC_VARIANT),
    supported,
    gram_scratch,
    {
        gram<float, InDoubles<float>, InDoubles<double>, InFloats<float>, InFloats<float>>,
        gram<Bfloat16, InFloats<Bfloat16>, PackedBfloat16, InFloats<Bfloat16>, PackedBfloat16>,
        gram<Float16, InDoubles<Float16>, InDoubles<double>, void, InFloats<float>>,
        gram<double, InDoubles<double>, InDoubles<double>, InDoubles<double>, InDoubles<double>>,
    },
    {combine<float>, combine<Bfloat16>, combine<Float16>, combine<double>},
    read_all,
    multiply_add,
};

}  // namespace gradvac::cpu::GRADVAC_VARIANT
