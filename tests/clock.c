/* Preloaded into a process: its wall clock is ahead of the machine's by the seconds that the file
 * CLOCK_OFFSET holds, eight bytes that may change meanwhile. Its monotonic clock is not touched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static int (*real)(clockid_t, struct timespec *);
static volatile int64_t *offset_s;

__attribute__((constructor)) static void start(void) {
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CLOCK_OFFSET");
    int fd = path ? open(path, O_RDONLY) : -1;
    void *shared = fd < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
    if (!real || shared == MAP_FAILED) abort();
    offset_s = shared;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int done = real(clock, now);
    if (done == 0 && clock == CLOCK_REALTIME) now->tv_sec += *offset_s;
    return done;
}
