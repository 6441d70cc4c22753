// A libcuda.so.1 for machines without NVIDIA's driver: torch's libraries link to these functions,
// but call only the first one while all tensors are fake.

int cuDevicePrimaryCtxGetState(int device, unsigned int *flags, int *is_active) {
  *flags = 0;
  *is_active = 0;
  return 0;
}

#define LINKED_ONLY(name) \
  int name(void) { return 0; }

LINKED_ONLY(cuCtxGetCurrent)
LINKED_ONLY(cuCtxSetCurrent)
LINKED_ONLY(cuDeviceGet)
LINKED_ONLY(cuDeviceGetAttribute)
LINKED_ONLY(cuDeviceGetCount)
LINKED_ONLY(cuDevicePrimaryCtxRetain)
LINKED_ONLY(cuDriverGetVersion)
LINKED_ONLY(cuFuncGetAttribute)
LINKED_ONLY(cuFuncSetAttribute)
LINKED_ONLY(cuFuncSetCacheConfig)
LINKED_ONLY(cuGetErrorName)
LINKED_ONLY(cuGetErrorString)
LINKED_ONLY(cuGetProcAddress_v2)
LINKED_ONLY(cuInit)
LINKED_ONLY(cuLaunchCooperativeKernel)
LINKED_ONLY(cuLaunchKernel)
LINKED_ONLY(cuLinkAddData_v2)
LINKED_ONLY(cuLinkComplete)
LINKED_ONLY(cuLinkCreate_v2)
LINKED_ONLY(cuModuleGetFunction)
LINKED_ONLY(cuModuleLoad)
LINKED_ONLY(cuModuleLoadData)
LINKED_ONLY(cuModuleLoadDataEx)
LINKED_ONLY(cuModuleUnload)
LINKED_ONLY(cuOccupancyMaxActiveBlocksPerMultiprocessor)
LINKED_ONLY(cuPointerGetAttribute)
LINKED_ONLY(cuTensorMapEncodeTiled)
