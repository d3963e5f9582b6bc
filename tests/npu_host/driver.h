// Between the stand-in driver (libascendcl.so) and the stand-in kernels.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// How a captured graph is kept: the kernels library owns what the handles point to.
typedef struct {
  void* (*begin)(void);            // a new recording, which every kernel from now on joins
  void (*end)(void* recording);    // nothing joins it any more
  const char* (*replay)(void* recording);  // run it again; null, or why it failed (valid until the next replay)
  void (*drop)(void* recording);
} npu_host_capture_hooks;

void npu_host_set_capture_hooks(const npu_host_capture_hooks* hooks);
int npu_host_capturing(void);
int npu_host_unsupported(const char* name);

#ifdef __cplusplus
}
#endif
