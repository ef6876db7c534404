// The stand-in driver's devices, kernels and log.
#pragma once

#include <cuda.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/append.h"
#include "common/merge.h"
#include "common/parts.h"

namespace {

constexpr int kDevices = 2;
constexpr unsigned kFatbinMagic = 0xBA55ED50;
constexpr uintptr_t kUrgentStream = 99;  // of a higher priority than others
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

struct FakeKernel {
  std::string name;
  int max_smem[kDevices] = {48 * 1024, 48 * 1024};  // dynamic, without opting in
};

int contexts[kDevices];                     // their addresses are the handles
thread_local std::vector<CUcontext> stack;  // of current contexts

__attribute__((format(printf, 1, 2))) void log(const char* format, ...) {
  static FILE* file = fopen(getenv("FAKE_CUDA_LOG"), "a");
  va_list args;
  va_start(args, format);
  vfprintf(file, format, args);
  va_end(args);
  fputc('\n', file);
  fflush(file);
}

int failure(const char* call) {
  const char* wanted = getenv("FAKE_CUDA_FAIL");
  const size_t length = strlen(call);
  return wanted && !strncmp(wanted, call, length) && wanted[length] == '=' ? atoi(wanted + length + 1) : 0;
}

int current_device() {
  for (int i = 0; i < kDevices; ++i)
    if (!stack.empty() && stack.back() == reinterpret_cast<CUcontext>(&contexts[i])) return i;
  return -1;
}

int smem(int which) {
  int values[2] = {228 * 1024, 227 * 1024};
  if (const char* given = getenv("FAKE_CUDA_SMEM")) sscanf(given, "%d,%d", &values[0], &values[1]);
  return values[which];
}

int number(const char* variable, int otherwise) {
  const char* given = getenv(variable);
  return given ? atoi(given) : otherwise;
}
int version() { return number("FAKE_CUDA_VERSION", 12030); }
int compute_capability() { return number("FAKE_CUDA_SM", 90); }

// The sizes of a kernel's parameters, which the real driver reads from its machine code.
std::vector<size_t> parameter_sizes(const std::string& kernel) {
  using namespace mla;
  if (kernel.rfind("mla_plan_parts", 0) == 0)
    return {sizeof(Lengths), sizeof(schedule::Shape), sizeof(int32_t), sizeof(PlanHeader*), sizeof(parts::Limits)};
  if (kernel.rfind("mla_plan", 0) == 0)
    return {sizeof(Lengths), sizeof(schedule::Shape), sizeof(int32_t), sizeof(PlanHeader*)};
  if (kernel.rfind("mla_combine", 0) == 0) return {sizeof(CombineParams), sizeof(schedule::Shape)};
  if (kernel.rfind("mla_append", 0) == 0) return {sizeof(AppendParams)};
  if (kernel.rfind("mla_merge", 0) == 0) return {sizeof(MergeParams)};
  if (kernel == "mla_stream") return {sizeof(void*), sizeof(int64_t), sizeof(void*)};
  return {sizeof(DecodeParams)};
}

std::string hex(const void* data, size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(data)[i]);
    text += digits;
  }
  return text;
}

}  // namespace
