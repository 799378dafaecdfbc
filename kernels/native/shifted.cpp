#include "shifted.h"

NATIVE_OPERATOR(shifted, ShiftedCall)
