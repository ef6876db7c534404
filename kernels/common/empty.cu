// Does nothing, with the parameters of a decode kernel: by it `mla bench --host` knows what a launch costs.
#include "params.h"

extern "C" __global__ void mla_empty(const __grid_constant__ mla::DecodeParams) {}
