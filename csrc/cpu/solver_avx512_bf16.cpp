#define GRADVAC_VARIANT avx512_bf16
#include "solver.h"
