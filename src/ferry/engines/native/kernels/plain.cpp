// For any processor: plain loops, as fast as the compiler makes them.
#define FERRY_NAME "_kernels_plain"
#define FERRY_INIT PyInit__kernels_plain
#include "functions.h"
