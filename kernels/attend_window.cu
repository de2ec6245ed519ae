// Attention to the last keys alone.
#define WINDOW 1
#include "attend.cuh"
