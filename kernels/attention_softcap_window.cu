// Sliding-window attention with soft-capped scores (every other block of Gemma 2).
#define SOFT_CAP 1
#define WINDOW 1
#include "attention.cuh"
