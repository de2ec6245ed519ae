// Attention to the last keys alone, with a cap of scores (Gemma 2, every other block).
#define CAP 1
#define WINDOW 1
#include "attend.cuh"
