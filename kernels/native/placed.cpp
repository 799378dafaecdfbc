#include "placed.h"

NATIVE_OPERATOR(placed, PlacedCall)
