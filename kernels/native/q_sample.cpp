#include "q_sample.h"

NATIVE_OPERATOR(q_sample, QSampleCall)
