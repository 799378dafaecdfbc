#include "noise_mse.h"

NATIVE_OPERATOR(noise_mse, NoiseMseCall)
