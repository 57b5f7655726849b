/* A CUDA driver without a device: what Triton's launcher calls, and a note of each
   launch. Built by tests/kernels/test_kernels_stub_driver.py as libcuda.so.1. */

#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define NO_DEVICE CUDA_SUCCESS  /* nothing to do, as nothing is there */
#define MOST 64

/* How many parameters the next launch has: the driver is not told. */
int stub_expected;
struct {
  const char *name;
  unsigned grid[3], threads, shared;
  uint64_t parameters[MOST];
} stub_noted;

/* A function's handle is its name. */
static char names[256][128];
static int known;

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  char *place = names[known++ % 256];
  strncpy(place, name, 127);
  *function = (CUfunction)place;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                          void **parameters, void **extra) {
  stub_noted.name = (const char *)function;
  stub_noted.grid[0] = config->gridDimX;
  stub_noted.grid[1] = config->gridDimY;
  stub_noted.grid[2] = config->gridDimZ;
  stub_noted.threads = config->blockDimX;
  stub_noted.shared = config->sharedMemBytes;
  for (int i = 0; i < stub_expected && i < MOST; i++)
    memcpy(&stub_noted.parameters[i], parameters[i], 8);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  int optin = CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
  *value = which == optin ? 227 * 1024 : 65536;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  *(CUdeviceptr *)value = at;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)names;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the stub driver has no errors";
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return NO_DEVICE; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return NO_DEVICE; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  return NO_DEVICE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return NO_DEVICE; }
CUresult cuCtxSetCurrent(CUcontext c) { return NO_DEVICE; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return NO_DEVICE; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) { return NO_DEVICE; }
