// Attention with soft-capped scores (Gemma 2).
#define SOFT_CAP 1
#include "attention.cuh"
