#include "solver_step.h"

NATIVE_OPERATOR(solver_step, SolverStepCall)
