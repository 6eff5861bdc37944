// main() of an emulated kernel: `driver REQUEST RESPONSE`, files in the machine's byte order.
//
// Request: u32 buffers, each u64 bytes and the bytes; u32 launches, each a name (u32 length, bytes),
// grid and block (3 u32 each), u32 bytes of dynamic shared memory, arguments (u32 length, bytes) and
// u32 pointers in them, each u32 place in the arguments and u32 buffer. Response: the buffers.
#pragma once

#include <string>

namespace emulate {

constexpr uint32_t THREADS_MAX = 1024;
// What a block can have on every capability from 8.0 on.
constexpr uint32_t DYNAMIC_SHARED_MAX = 99 << 10;

struct Kernel {
  std::string name;
  uint32_t args_bytes, threads_max;
  Body body;
};
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}
inline Entry::Entry(const char* name, uint32_t args_bytes, uint32_t threads_max, Body body) {
  kernels().push_back({name, args_bytes, threads_max, body});
}

struct Pointer {
  uint32_t place, buffer;
};
struct Launch {
  std::string name;
  Dim grid, block;
  uint32_t shared_bytes;
  std::string args;
  std::vector<Pointer> pointers;
};

[[noreturn]] inline void refuse(const std::string& why) {
  fprintf(stderr, "emulate: %s\n", why.c_str());
  fflush(stderr);
  _exit(2);
}

struct Reader {
  FILE* file;
  template <typename T>
  T value() {
    T value;
    if (fread(&value, sizeof value, 1, file) != 1) refuse("the request is cut off");
    return value;
  }
  std::string bytes(size_t count) {
    std::string bytes(count, 0);
    if (count && fread(&bytes[0], count, 1, file) != 1) refuse("the request is cut off");
    return bytes;
  }
};

// Exactly as large as asked for, so that AddressSanitizer sees the first byte too many.
struct Buffer {
  explicit Buffer(const std::string& from) : bytes(from.size()) {
    data = static_cast<unsigned char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
    memcpy(data, from.data(), bytes);
    ASAN_POISON_MEMORY_REGION(data + bytes, (16 - bytes % 16) % 16);
  }
  size_t bytes;
  unsigned char* data;
};

inline const Kernel& find(const Launch& launch) {
  for (const Kernel& kernel : kernels()) {
    if (kernel.name != launch.name) continue;
    uint32_t threads = launch.block.x * launch.block.y * launch.block.z;
    if (launch.args.size() != kernel.args_bytes) {
      refuse(launch.name + " takes " + std::to_string(kernel.args_bytes) + " bytes of arguments, not " +
             std::to_string(launch.args.size()));
    }
    if (threads == 0 || threads > kernel.threads_max || threads > THREADS_MAX) {
      refuse(launch.name + " does not take " + std::to_string(threads) + " threads");
    }
    if (launch.shared_bytes > DYNAMIC_SHARED_MAX) refuse(launch.name + " has too much shared memory");
    return kernel;
  }
  refuse("there is no " + launch.name);
}

inline void run_launch(const Launch& launch, const std::vector<Buffer>& buffers) {
  const Kernel& kernel = find(launch);
  std::vector<uint64_t> args((launch.args.size() + 7) / 8);
  memcpy(args.data(), launch.args.data(), launch.args.size());
  for (const Pointer& pointer : launch.pointers) {
    unsigned char* data = buffers.at(pointer.buffer).data;
    memcpy(reinterpret_cast<unsigned char*>(args.data()) + pointer.place, &data, sizeof data);
  }
  world.kernel = kernel.name.c_str();
  world.body = kernel.body;
  world.args = args.data();
  gridDim = launch.grid;
  blockDim = launch.block;
  uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
  while (world.fibers.size() > threads) {
    free(world.fibers.back().stack);
    world.fibers.pop_back();
  }
  while (world.fibers.size() < threads) {
    world.fibers.emplace_back();
    world.fibers.back().index = uint32_t(world.fibers.size() - 1);
    world.fibers.back().stack = static_cast<unsigned char*>(aligned_alloc(64, STACK_BYTES));
  }
  std::string poison(launch.shared_bytes, static_cast<char>(SHARED_POISON));
  uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks; i++) {
    uint64_t at = world.backwards ? blocks - 1 - i : i;
    blockIdx = {uint32_t(at % gridDim.x), uint32_t(at / gridDim.x % gridDim.y),
                uint32_t(at / gridDim.x / gridDim.y)};
    Buffer shared(poison);
    world.dynamic_shared = shared.data;
    run_block();
    free(shared.data);
  }
}

inline Launch read_launch(Reader& in) {
  Launch launch;
  launch.name = in.bytes(in.value<uint32_t>());
  launch.grid = in.value<Dim>();
  launch.block = in.value<Dim>();
  launch.shared_bytes = in.value<uint32_t>();
  launch.args = in.bytes(in.value<uint32_t>());
  launch.pointers.resize(in.value<uint32_t>());
  for (Pointer& pointer : launch.pointers) pointer = in.value<Pointer>();
  return launch;
}

inline int drive(const char* request, const char* response) {
  Reader in{fopen(request, "rb")};
  if (!in.file) refuse("no request");
  std::vector<std::string> before(in.value<uint32_t>());
  for (std::string& bytes : before) bytes = in.bytes(in.value<uint64_t>());
  std::vector<Launch> launches(in.value<uint32_t>());
  for (Launch& launch : launches) launch = read_launch(in);
  fclose(in.file);

  std::vector<Buffer> after[2];
  for (int order = 0; order < 2; order++) {
    world.backwards = order == 1;
    for (const std::string& bytes : before) after[order].emplace_back(bytes);
    for (const Launch& launch : launches) run_launch(launch, after[order]);
  }
  for (size_t i = 0; i < before.size(); i++) {
    if (memcmp(after[0][i].data, after[1][i].data, before[i].size()) != 0) {
      refuse(launches.back().name + ": buffer " + std::to_string(i) + " depends on the order of threads");
    }
  }
  FILE* out = fopen(response, "wb");
  if (!out) refuse("no response");
  for (const Buffer& buffer : after[0]) fwrite(buffer.data, 1, buffer.bytes, out);
  return fclose(out) == 0 ? 0 : 2;
}

}  // namespace emulate

#ifdef EMULATE_LIBRARY
// A launch on memory of this process: `args` hold its addresses. `shape` is grid, block and the bytes of
// dynamic shared memory.
extern "C" __attribute__((visibility("default"))) void emulate_launch(const char* name,
                                                                      const uint32_t* shape,
                                                                      const char* args,
                                                                      uint64_t args_bytes) {
  emulate::Launch launch;
  launch.name = name;
  launch.grid = {shape[0], shape[1], shape[2]};
  launch.block = {shape[3], shape[4], shape[5]};
  launch.shared_bytes = shape[6];
  launch.args = std::string(args, args_bytes);
  emulate::run_launch(launch, {});
}
#else
int main(int count, char** args) {
  if (count != 3) emulate::refuse("usage: driver REQUEST RESPONSE");
  int code = emulate::drive(args[1], args[2]);
  // Buffers and stacks live until here; nothing looks for leaks.
  fflush(nullptr);
  _exit(code);
}
#endif
