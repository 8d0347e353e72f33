// A libcuda.so.1 that loads cubins, tells of one GPU, and notes launches; nothing runs.
#define cuTensorMapEncodeTiled cuTensorMapEncodeTiled_as_declared
#include <cuda.h>
#undef cuTensorMapEncodeTiled
#undef cuPointerGetAttribute

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 256
enum { FORM_SIZED = 4, ATTRIBUTE_PARAMETER = 0x17 };  // of entries in .nv.info

typedef struct {
  char name[256];
  int count;
  int sizes[MOST];
} Function;

// The last launch; tests read it by ctypes.
struct {
  int64_t launches;
  int32_t grid[3], threads, shared, count;
  int32_t sizes[MOST];
  uint64_t stream, function, values[MOST];
} noted;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "of the fake driver", CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return *value = 232448, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return *value = 65536, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return *value = 132, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return *value = 32, CUDA_SUCCESS;
    default: return *value = 49152, CUDA_SUCCESS;
  }
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }

// Parameters are what the section .nv.info.NAME of the cubin tells.
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  const Elf64_Ehdr* elf = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + elf->e_shoff);
  const char* names = image + sections[elf->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < elf->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    Function* known = calloc(1, sizeof *known);
    snprintf(known->name, sizeof known->name, "%s", name);
    const char *entry = image + sections[i].sh_offset, *end = entry + sections[i].sh_size;
    for (uint16_t extent; entry < end; entry += 4 + (entry[0] == FORM_SIZED ? extent : 0)) {
      memcpy(&extent, entry + 2, 2);
      if (entry[0] != FORM_SIZED || entry[1] != ATTRIBUTE_PARAMETER) continue;
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, entry + 8, 2);
      memcpy(&flags, entry + 12, 4);
      if (ordinal >= MOST) return CUDA_ERROR_INVALID_IMAGE;
      known->sizes[ordinal] = (int)(flags >> 18);
      if (ordinal >= known->count) known->count = ordinal + 1;
    }
    *function = (CUfunction)known;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = 1, CUDA_SUCCESS;
}
int cuTensorMapEncodeTiled(void) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  const Function* known = (const Function*)function;
  const int32_t grid[] = {(int)config->gridDimX, (int)config->gridDimY, (int)config->gridDimZ};
  ++noted.launches;
  memcpy(noted.grid, grid, sizeof grid);
  noted.threads = (int)config->blockDimX;
  noted.shared = (int)config->sharedMemBytes;
  noted.stream = (uint64_t)config->hStream;
  noted.function = (uint64_t)function;
  noted.count = known->count;
  for (int i = 0; i < known->count; ++i) {
    noted.sizes[i] = known->sizes[i];
    noted.values[i] = 0;
    if (known->sizes[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    memcpy(&noted.values[i], parameters[i], known->sizes[i]);
  }
  return CUDA_SUCCESS;
}
