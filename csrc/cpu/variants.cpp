#include "variants.h"

#include <cstring>

namespace gradvac::cpu {

#ifdef GRADVAC_X86
namespace avx512_bf16 {
extern const Variant table;
}
namespace avx512 {
extern const Variant table;
}
namespace avx2 {
extern const Variant table;
}
#endif
namespace portable {
extern const Variant table;
}

namespace {

const Variant* const kVariants[] = {
#ifdef GRADVAC_X86
    &avx512_bf16::table,
    &avx512::table,
    &avx2::table,
#endif
    &portable::table,
};
const Variant* chosen = nullptr;

}  // namespace

const Variant* const* variants(int* count) {
  *count = sizeof(kVariants) / sizeof(kVariants[0]);
  return kVariants;
}

bool use(const char* name) {
  for (const Variant* candidate : kVariants) {
    if (candidate->supported() && (name == nullptr ? !candidate->slow() : std::strcmp(name, candidate->name) == 0)) {
      chosen = candidate;
      return true;
    }
  }
  return false;
}

const Variant& variant() {
  if (chosen == nullptr) use(nullptr);  // portable is always supported
  return *chosen;
}

}  // namespace gradvac::cpu
