#define GRADVAC_VARIANT portable
#include "solver.h"
