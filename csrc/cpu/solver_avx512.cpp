#define GRADVAC_VARIANT avx512
#include "solver.h"
