// Attention whose scores have a cap (Gemma 2).
#define CAP 1
#include "attend.cuh"
