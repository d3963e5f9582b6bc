// Communicators without a device: what torch_npu's process group asks of HCCL, and nothing that moves data.
//
// A communicator is the name that its first rank made; torch_npu's own code hands that to the other ranks through
// the group's store. The ops that communicate are kernels of npu_host_ops, over gloo. Built into libascendcl.so.

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>

#include "third_party/hccl/inc/hccl/hccl.h"

namespace {

struct Communicator {
  std::string name;
};
std::atomic<uint32_t> next_root{0};

HcclResult open(const HcclRootInfo* root, HcclComm* comm) {
  return *comm = new Communicator{root->internal}, HCCL_SUCCESS;
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root) {
  std::string name = "npu_host_" + std::to_string(getpid()) + "_" + std::to_string(next_root++);
  std::memset(root->internal, 0, sizeof(root->internal));
  std::memcpy(root->internal, name.data(), name.size());
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t, const HcclRootInfo* root, uint32_t, HcclComm* comm) { return open(root, comm); }

HcclResult HcclCommInitRootInfoConfig(uint32_t, const HcclRootInfo* root, uint32_t, const HcclCommConfig*,
                                      HcclComm* comm) {
  return open(root, comm);
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  return std::strcpy(name, static_cast<Communicator*>(comm)->name.c_str()), HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* error) { return *error = HCCL_SUCCESS, HCCL_SUCCESS; }

HcclResult HcclCommDestroy(HcclComm comm) { return delete static_cast<Communicator*>(comm), HCCL_SUCCESS; }

}  // extern "C"
