// For x86 processors with AVX2, FMA and F16C.
#define FERRY_NAME "_kernels_avx2"
#define FERRY_INIT PyInit__kernels_avx2
#include "functions.h"
