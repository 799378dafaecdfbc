#include "guidance_rescale.h"

NATIVE_OPERATOR(guidance_rescale, GuidanceRescaleCall)
