// Functions of the device and of the host.
#pragma once

#ifdef __CUDACC__
#define INFOLD_BOTH __host__ __device__ __forceinline__
#else
#define INFOLD_BOTH inline
#endif
