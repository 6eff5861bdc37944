/* A libnvidia-ml.so that says what a file says: `script`, beside the library. It is read anew at
 * every call, so a test changes the GPUs while they are sampled. Lines:
 *
 *   init CODE                what nvmlInit_v2 returns
 *   count CODE               what nvmlDeviceGetCount_v2 returns
 *   sleep_ms N               how long every sample of power takes
 *   device UUID KEY=N ...    a GPU, in the order of NVML indices; `lost=CODE` fails all its calls,
 *                            and a quantity that is not given is not supported; `draws=1` counts
 *                            energy at `power` from the first look on
 *   process UUID KEY=N ...   pid, mem (bytes), and for a sample of use: sm, ts (microseconds)
 *
 * `-DWITHOUT_X` leaves out function X. Calls of init and shutdown are noted in the file `calls`.
 * Declarations after NVIDIA's NVML API reference; only what our server calls is here. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { LINES_MAX = 64, LINE_MAX_ = 512, HANDLES_MAX = 16 };

static char lines[LINES_MAX][LINE_MAX_];
static int lines_len;
/* A handle stays with its UUID, wherever the device moves in the order. */
static char handles[HANDLES_MAX][96];

static FILE *beside(const char *name, const char *mode) {
    Dl_info info;
    char path[4096];
    if (!dladdr((void *)beside, &info) || strlen(info.dli_fname) > sizeof path - 32) return NULL;
    strcpy(path, info.dli_fname);
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, name);
    return fopen(path, mode);
}

static void read_script(void) {
    FILE *file = beside("script", "r");
    lines_len = 0;
    while (file && lines_len < LINES_MAX && fgets(lines[lines_len], LINE_MAX_, file)) lines_len++;
    if (file) fclose(file);
}

static void note(const char *call) {
    FILE *file = beside("calls", "a");
    if (file) { fprintf(file, "%s\n", call); fclose(file); }
}

/* The n-th line that begins with `word`, after it; NULL if there is none. */
static const char *line(const char *word, int n) {
    size_t len = strlen(word);
    for (int i = 0; i < lines_len; i++)
        if (!strncmp(lines[i], word, len) && lines[i][len] == ' ' && n-- == 0)
            return lines[i] + len + 1;
    return NULL;
}

static long long setting(const char *word, long long otherwise) {
    const char *text = line(word, 0);
    return text ? atoll(text) : otherwise;
}

/* `KEY=N` of a line; -1 if it is not there. */
static long long value(const char *text, const char *key) {
    size_t len = strlen(key);
    for (const char *at = text; at && (at = strstr(at, key)); at += len)
        if (at > text && at[-1] == ' ' && at[len] == '=') return atoll(at + len + 1);
    return -1;
}

static int is_about(const char *text, const char *uuid) {
    size_t len = strlen(uuid);
    return !strncmp(text, uuid, len) && (text[len] == ' ' || text[len] == '\n');
}

/* The device's line, or an error: it is gone or lost. */
static int device(const char *uuid, const char **found) {
    const char *text;
    read_script();
    for (int i = 0; (text = line("device", i)); i++) {
        if (!is_about(text, uuid)) continue;
        long long lost = value(text, "lost");
        *found = text;
        return lost > 0 ? (int)lost : SUCCESS;
    }
    return INVALID;
}

static int quantity(const char *uuid, const char *key, long long *out) {
    const char *text;
    int code = device(uuid, &text);
    if (code) return code;
    *out = value(text, key);
    return *out < 0 ? NOT_SUPPORTED : SUCCESS;
}

/* Since it was first asked. */
static long long uptime_us(void) {
    static long long first;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long us = now.tv_sec * 1000000LL + now.tv_nsec / 1000;
    if (!first) first = us;
    return us - first;
}

#ifndef WITHOUT_nvmlInit_v2
int nvmlInit_v2(void) {
    read_script();
    note("init");
    return (int)setting("init", SUCCESS);
}
#endif

#ifndef WITHOUT_nvmlShutdown
int nvmlShutdown(void) {
    note("shutdown");
    return SUCCESS;
}
#endif

#ifndef WITHOUT_nvmlDeviceGetCount_v2
int nvmlDeviceGetCount_v2(unsigned *count) {
    read_script();
    for (*count = 0; line("device", (int)*count);) ++*count;
    return (int)setting("count", SUCCESS);
}
#endif

#ifndef WITHOUT_nvmlDeviceGetHandleByIndex_v2
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    read_script();
    const char *text = line("device", (int)index);
    if (!text) return INVALID;
    if (value(text, "lost") > 0) return (int)value(text, "lost");
    char uuid[96] = "";
    sscanf(text, "%95s", uuid);
    for (int i = 0; i < HANDLES_MAX; i++) {
        if (!handles[i][0]) strcpy(handles[i], uuid);
        if (!strcmp(handles[i], uuid)) { *handle = handles[i]; return SUCCESS; }
    }
    return INVALID;
}
#endif

#ifndef WITHOUT_nvmlDeviceGetUUID
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned len) {
    const char *text;
    int code = device(handle, &text);
    if (!code) snprintf(uuid, len, "%s", (char *)handle);
    return code;
}
#endif

int nvmlDeviceGetName(void *handle, char *name, unsigned len) {
    const char *text;
    int code = device(handle, &text);
    if (!code) snprintf(name, len, "Fake %s", (char *)handle);
    return code;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned rates[2]) {
    long long gpu, memory;
    int code = quantity(handle, "gpu", &gpu);
    if (!code) code = quantity(handle, "mem_busy", &memory);
    if (!code) { rates[0] = (unsigned)gpu; rates[1] = (unsigned)memory; }
    return code;
}

struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *memory) {
    long long total, used;
    int code = quantity(handle, "mem_total", &total);
    if (!code) code = quantity(handle, "mem_used", &used);
    if (!code) { memory->total = total; memory->used = used; memory->free = total - used; }
    return code;
}

#ifndef WITHOUT_nvmlDeviceGetPowerUsage
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    long long power;
    int code = quantity(handle, "power", &power);
    usleep((useconds_t)setting("sleep_ms", 0) * 1000);
    if (!code) *milliwatts = (unsigned)power;
    return code;
}
#endif

#ifndef WITHOUT_nvmlDeviceGetTotalEnergyConsumption
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    long long energy;
    const char *text;
    int code = device(handle, &text);
    if (code) return code;
    if (value(text, "draws") > 0) energy = value(text, "power") * uptime_us() / 1000000;
    else energy = value(text, "energy");
    if (energy < 0) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)energy;
    return SUCCESS;
}
#endif

int nvmlDeviceGetClockInfo(void *handle, unsigned kind, unsigned *megahertz) {
    long long clock;
    int code = quantity(handle, kind == 1 ? "sm_clock" : kind == 2 ? "mem_clock" : "-", &clock);
    if (!code) *megahertz = (unsigned)clock;
    return code;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    long long bits;
    int code = quantity(handle, "throttle", &bits);
    if (!code) *reasons = (unsigned long long)bits;
    return code;
}

struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *out) {
    const char *text;
    unsigned room = *count;
    int code = device(handle, &text);
    *count = 0;
    for (int i = 0; !code && (text = line("process", i)); i++) {
        if (!is_about(text, handle) || value(text, "mem") < 0) continue;
        if (*count < room)
            out[*count] = (struct process){ (unsigned)value(text, "pid"),
                                            (unsigned long long)value(text, "mem"), ~0u, ~0u };
        ++*count;
    }
    return code ? code : *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

struct use { unsigned pid; unsigned long long at_us; unsigned sm, memory, encoder, decoder; };

#ifndef WITHOUT_nvmlDeviceGetProcessUtilization
int nvmlDeviceGetProcessUtilization(void *handle, struct use *out, unsigned *count,
                                    unsigned long long since_us) {
    const char *text;
    unsigned room = out ? *count : 0;
    int code = device(handle, &text);
    *count = 0;
    for (int i = 0; !code && (text = line("process", i)); i++) {
        if (!is_about(text, handle) || value(text, "sm") < 0) continue;
        if ((unsigned long long)value(text, "ts") <= since_us) continue;
        if (*count < room)
            out[*count] = (struct use){ (unsigned)value(text, "pid"),
                                        (unsigned long long)value(text, "ts"),
                                        (unsigned)value(text, "sm"), 0, 0, 0 };
        ++*count;
    }
    if (code) return code;
    return *count == 0 ? NOT_FOUND : *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}
#endif
