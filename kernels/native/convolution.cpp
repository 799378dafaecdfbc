#include "convolution.h"

NATIVE_OPERATOR(convolution, ConvolutionCall)
