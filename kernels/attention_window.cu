// Sliding-window attention.
#define WINDOW 1
#include "attention.cuh"
