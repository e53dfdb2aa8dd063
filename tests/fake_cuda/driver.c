/* The driver's library, libcuda.so.1: what it runs and the device that it finds.
 *
 * FAKE_CUDA_DRIVER=13000 is the newest CUDA that it runs; FAKE_CUDA_CC=75 the device's compute capability. What this file does
 * not define, build.py defines to succeed.
 */
#include <stdlib.h>
#include <string.h>

enum { MAJOR = 75, MINOR = 76 };

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "a fake device", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = (size_t)15 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int cc = number("FAKE_CUDA_CC", 75);
    *value = attribute == MAJOR ? cc / 10 : attribute == MINOR ? cc % 10 : 0;
    return 0;
}
