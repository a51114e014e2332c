/* A libcuda that does nothing but count: what Triton's launcher needs to load and launch a kernel. */
#include "cuda.h"

#undef cuCtxGetDevice
#undef cuDevicePrimaryCtxRetain

static unsigned long long launches, loads;
static int shared_memory = 232448, load_error = 0;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)module; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
    switch (name) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1024;
    }
    return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction function) {
    *value = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
    return 0;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return 0;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)(16 * ++loads);
    return load_error;
}

/* What the last launches were asked for: grid, threads, shared memory, stream, function, whether all programs run at
   once, and parameters. How many bytes each parameter has is known only to who expects the launch. */
#define KEPT 64
#define MOST 96
#define HEAD 8
static unsigned long long asked[KEPT][HEAD + MOST];
static unsigned char expected[KEPT][MOST];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    unsigned long long *a = asked[launches++ % KEPT];
    a[0] = config->gridDimX; a[1] = config->gridDimY; a[2] = config->gridDimZ;
    a[3] = config->blockDimX; a[4] = config->sharedMemBytes; a[5] = (unsigned long long)config->hStream;
    a[6] = (unsigned long long)function;
    a[7] = 0;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) a[7] = config->attrs[i].value.cooperative;
    unsigned char *bytes = expected[(launches - 1) % KEPT];
    for (int i = 0; i < MOST; i++) {
        a[HEAD + i] = 0;
        for (int j = 0; j < bytes[i]; j++) ((unsigned char *)&a[HEAD + i])[j] = ((unsigned char *)parameters[i])[j];
        bytes[i] = 0;
    }
    return 0;
}

/* Before launch number `launch`, counted from 0: its parameter number `i` has so many bytes. */
void stub_expect(unsigned long long launch, int i, int bytes) { expected[launch % KEPT][i] = bytes; }

unsigned long long stub_asked(unsigned long long launch, int i) { return asked[launch % KEPT][i]; }

void stub_shared_memory(int bytes) { shared_memory = bytes; }
void stub_refuse_loads(int error) { load_error = error; }

unsigned long long stub_launches(void) { return launches; }
unsigned long long stub_loads(void) { return loads; }
