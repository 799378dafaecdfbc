#include "bottleneck.h"

NATIVE_OPERATOR(bottleneck, BottleneckCall)
