#include "group_norm_relu.h"

NATIVE_OPERATOR(group_norm_relu, GroupNormReluCall)
