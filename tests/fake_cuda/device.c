/* A CUDA device that allocates, copies, counts launches and records graphs, and computes nothing.
 *
 * Preloaded before onnxruntime-gpu, it lets the real graph partitioner and the real host code of the kernels run without a GPU.
 * FAKE_CUDA_CC=75 is its compute capability. FAKE_CUDA_LOG=1 writes a line to standard error for every launch, and for every
 * one that a real device would reject. What this file does not define, build.py defines to succeed.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MEMORY_GIB = 15, MULTIPROCESSORS = 40, THREADS = 1024, SHARED_BYTES = 48 << 10, HANDLE_BYTES = 256 };

static int compute_capability(void) {
    const char *text = getenv("FAKE_CUDA_CC");
    return text ? atoi(text) : 75;
}

/* Shared memory that a block may ask for: 64 KiB on 7.5, 99 KiB on 8.6, 8.9 and 12.x, 163 KiB on 8.0, 227 KiB on 9.x. */
static int shared_bytes_opt_in(void) {
    int cc = compute_capability();
    return (cc < 80 ? 64 : cc == 80 ? 163 : cc / 10 == 9 || cc / 10 == 10 ? 227 : 99) << 10;
}

static int logging(void) {
    static int on = -1;
    if (on < 0) on = getenv("FAKE_CUDA_LOG") != NULL;
    return on;
}

/* One stream at a time records a graph. A launch is then recorded and not executed. */
static int capturing, recorded;

/* Called by the functions that build.py writes, for matrix products of cuBLAS. */
void fake_cuda_launch(const char *name) {
    recorded += capturing;
    if (logging()) fprintf(stderr, "fake-cuda %s %s\n", capturing ? "recorded" : "launch", name);
}

/* What a device rejects while a graph is recorded in global mode: whatever allocates or waits. */
static cudaError_t unless_capturing(const char *name) {
    if (!capturing) return cudaSuccess;
    if (logging()) fprintf(stderr, "fake-cuda rejected %s during capture\n", name);
    return cudaErrorStreamCaptureUnsupported;
}

/* The device. */

cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "a fake device");
    found->major = compute_capability() / 10;
    found->minor = compute_capability() % 10;
    found->totalGlobalMem = (size_t)MEMORY_GIB << 30;
    found->multiProcessorCount = MULTIPROCESSORS;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsPerMultiProcessor = THREADS;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = THREADS;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->sharedMemPerBlock = SHARED_BYTES;
    found->sharedMemPerBlockOptin = found->sharedMemPerMultiprocessor = shared_bytes_opt_in();
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 4 << 20;
    found->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = compute_capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = compute_capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = THREADS; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_BYTES; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes_opt_in(); break;
    default: *value = 0;
    }
    return cudaSuccess;
}

/* Memory is the host's. */

static cudaError_t allocate(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = (size_t)MEMORY_GIB << 30;
    *available = *total - ((size_t)1 << 30);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **memory, size_t size) {
    cudaError_t error = unless_capturing("cudaMalloc");
    if (error) return error;
    return allocate(memory, size);
}
cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream) { return allocate(memory, size); }
cudaError_t cudaMallocHost(void **memory, size_t size) {
    cudaError_t error = unless_capturing("cudaMallocHost");
    if (error) return error;
    return allocate(memory, size);
}
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    cudaError_t error = unless_capturing("cudaHostAlloc");
    if (error) return error;
    return allocate(memory, size);
}
cudaError_t cudaFree(void *memory) {
    cudaError_t error = unless_capturing("cudaFree");
    if (error) return error;
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { free(memory); return cudaSuccess; }
cudaError_t cudaFreeHost(void *memory) {
    cudaError_t error = unless_capturing("cudaFreeHost");
    if (error) return error;
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t error = unless_capturing("cudaMemcpy");
    if (error) return error;
    memmove(to, from, size);
    return cudaSuccess;
}
/* A copy of the host's memory is recorded with an address that holds something else when the graph is replayed. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = kind == cudaMemcpyDeviceToDevice ? cudaSuccess : unless_capturing("cudaMemcpyAsync");
    if (error) return error;
    memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, enum cudaMemcpyKind kind) {
    memset(to, 0, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) {
    cudaError_t error = unless_capturing("cudaMemset");
    if (error) return error;
    memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
    memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *memory) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = (void *)memory;
    return cudaSuccess;
}

/* Streams and events are handles that nothing waits for. */

static cudaError_t make_handle(void **handle) {
    *handle = calloc(1, HANDLE_BYTES);
    return *handle ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return make_handle((void **)stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return make_handle((void **)stream); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return make_handle((void **)event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return make_handle((void **)event); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return unless_capturing("cudaStreamSynchronize"); }
cudaError_t cudaDeviceSynchronize(void) { return unless_capturing("cudaDeviceSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return unless_capturing("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

/* Graphs: how many launches each holds is all that is recorded. */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (capturing) return cudaErrorIllegalState;
    if (logging()) fprintf(stderr, "fake-cuda capture begins\n");
    capturing = 1;
    recorded = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!capturing) return cudaErrorIllegalState;
    capturing = 0;
    if (logging()) fprintf(stderr, "fake-cuda capture ends, %d launches\n", recorded);
    return make_handle((void **)graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return make_handle((void **)executable);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    if (logging()) fprintf(stderr, "fake-cuda replay\n");
    return cudaSuccess;
}

/* Kernels are known by the names under which the compiler's start-up code registers them. */

enum { MOST_KERNELS = 1 << 18 };
static struct { const void *host; const char *name; } kernels[MOST_KERNELS];
static int kernel_count;

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int e, size_t size, int c, int g) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid, int *warp) {
    if (kernel_count < MOST_KERNELS) {
        kernels[kernel_count].host = host;
        kernels[kernel_count++].name = name;
    }
}

static const char *name_of(const void *kernel) {
    for (int i = 0; i < kernel_count; i++)
        if (kernels[i].host == kernel) return kernels[i].name;
    return "unknown";
}

static cudaError_t launch(const void *kernel, dim3 grid, dim3 block, size_t shared) {
    unsigned threads = block.x * block.y * block.z;
    fake_cuda_launch(name_of(kernel));
    int rejected = !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > THREADS ||
                   shared > (size_t)shared_bytes_opt_in();
    if (rejected && logging())
        fprintf(stderr, "fake-cuda rejected %s grid %u,%u,%u threads %u shared %zu\n", name_of(kernel), grid.x, grid.y, grid.z,
                threads, shared);
    return rejected ? cudaErrorInvalidConfiguration : cudaSuccess;
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *host) { *kernel = (void *)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    return launch(kernel, grid, block, shared);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    return launch(kernel, grid, block, shared);
}
cudaError_t cudaFuncGetName(const char **name, const void *kernel) { *name = name_of(kernel); return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared,
                                                                    unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = NULL;
    return cudaSuccess;
}
