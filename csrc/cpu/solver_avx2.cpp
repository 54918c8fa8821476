#define GRADVAC_VARIANT avx2
#include "solver.h"
