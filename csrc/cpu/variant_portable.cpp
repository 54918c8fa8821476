#define GRADVAC_VARIANT portable
#define GRADVAC_SUPPORTED true
#include "variant.h"
