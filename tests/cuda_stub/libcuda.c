// A CUDA driver without a GPU: what Triton asks of libcuda.so.1 from loading a kernel to its launch, of which it
// reports the arguments. Device memory is that of the host. It refuses what the driver of an H100 refuses.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { SHARED_BY_DEFAULT = 48 << 10, SHARED_AT_MOST = 227 << 10, REGISTERS = 64 << 10, PROCESSORS = 132 };

struct CUfunc_st {
  char* name;
  unsigned shared;  // dynamic, bytes that a launch may ask for
};

typedef void Report(CUfunction function, const char* name, const unsigned* shape, CUstream stream, void** parameters);

static Report* report;
static CUcontext context;

// `shape` is the grid, the block and the bytes of shared memory; how many parameters there are, the caller must know.
void report_launches_to(Report* function) {
  report = function;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_IMAGE   ? "not a cubin"
          : error == CUDA_ERROR_INVALID_VALUE ? "a value that the stub of libcuda refuses"
                                              : "what the stub of libcuda does not have";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = SHARED_AT_MOST;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = SHARED_AT_MOST + 1024;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = REGISTERS;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = PROCESSORS;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 1;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) {
  *retained = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) {
  context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return memcmp(image, "\177ELF", 4) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleUnload(CUmodule module) {
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = malloc(sizeof **function);
  (*function)->name = strdup(name);
  (*function)->shared = SHARED_BY_DEFAULT;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  // a driver that knows no larger mode, as Triton tries one
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > SHARED_AT_MOST)
    return CUDA_ERROR_INVALID_VALUE;
  function->shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_NOT_SUPPORTED;
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

// What NVIDIA's driver makes of a tensor map, nobody else can read. This one keeps what it was asked for, with the
// contiguous dimension first; test_triton_launcher.py has its layout.
typedef struct {
  uint64_t base;
  uint32_t type, fill;  // Triton clears bit 21 of the second word, an error of old drivers
  uint64_t sizes[2];
  uint64_t stride;  // bytes from row to row
  uint32_t box[2];
  uint32_t swizzle;
} Map;

_Static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a map fits where Triton keeps it");

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      return 4;
    default:
      return 0;
  }
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map,
    CUtensorMapDataType type,
    cuuint32_t rank,
    void* base,
    const cuuint64_t* sizes,
    const cuuint64_t* strides,
    const cuuint32_t* box,
    const cuuint32_t* steps,
    CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  if (rank != 2 || bytes_of(type) == 0 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return CUDA_ERROR_NOT_SUPPORTED;  // no kernel here has another
  if ((uintptr_t)map % 64 != 0 || (uintptr_t)base % 16 != 0 || strides[0] % 16 != 0 || strides[0] >> 40 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32) || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  }
  unsigned width = box[0] * bytes_of(type), span = 16u << swizzle;  // bytes; 32, 64 and 128 of swizzles 1, 2 and 3
  if (width % 16 != 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && width > span))
    return CUDA_ERROR_INVALID_VALUE;
  Map made = {(uintptr_t)base, type, fill, {sizes[0], sizes[1]}, strides[0], {box[0], box[1]}, swizzle};
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  const unsigned shape[] = {
      config->gridDimX,
      config->gridDimY,
      config->gridDimZ,
      config->blockDimX,
      config->blockDimY,
      config->blockDimZ,
      config->sharedMemBytes};
  for (int i = 0; i < 6; ++i) {
    if (shape[i] == 0)
      return CUDA_ERROR_INVALID_VALUE;
  }
  if (config->gridDimY > 65535 || config->gridDimZ > 65535 || config->sharedMemBytes > function->shared ||
      config->blockDimX * config->blockDimY * config->blockDimZ > 1024)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->numAttrs != 0 || extra != NULL)  // no clusters, no cooperation, which no kernel here has
    return CUDA_ERROR_NOT_SUPPORTED;
  report(function, function->name, shape, config->hStream, parameters);
  return CUDA_SUCCESS;
}
