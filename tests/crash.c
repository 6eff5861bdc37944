/* Preloaded into a process: counts what it does to the files of its ledger (write, truncate, sync,
 * rename, unlink) and kills it at the CRASH_AT-th, before that is done. CRASH_MODE says what becomes
 * of the files: `kill` leaves them as the kernel has them, `unsynced` undoes all that was not synced,
 * `torn` keeps some of that, whole or half, chosen by CRASH_SEED.
 * CRASH_COUNTER names a file of eight bytes that holds the count, also after the kill. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A write or a truncation that is not synced: enough to undo and to do it again. */
struct change {
    struct change *older, *newer;
    char path[PATH_MAX];
    off_t offset, old_size, new_size;
    size_t old_len, new_len;
    char *old_bytes, *new_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct change *newest, *oldest;
static uint64_t *counter, fallback;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static uint64_t number(const char *name) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : 0;
}

static int mode_is(const char *name) {
    const char *mode = getenv("CRASH_MODE");
    return mode && strcmp(mode, name) == 0;
}

static int is_ledger(const char *path) {
    const char *name = strrchr(path, '/');
    return name && strncmp(name, "/ledger.sqlite", 14) == 0 && !strstr(name, "-shm");
}

/* The path of an open file of the ledger; 0 for any other file. */
static int ledger_path(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, PATH_MAX - 1);
    if (len <= 0) return 0;
    path[len] = 0;
    return is_ledger(path);
}

static void count_up(void) {
    if (!counter) {
        const char *path = getenv("CRASH_COUNTER");
        int fd = path ? open(path, O_RDWR) : -1;
        void *shared = fd < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        counter = shared == MAP_FAILED ? &fallback : shared;
        if (fd >= 0) close(fd);
    }
    ++*counter;
}

static off_t size_of(int fd) {
    struct stat about;
    return fstat(fd, &about) == 0 ? about.st_size : 0;
}

/* Remembers what is about to change; nothing for the mode that needs none of it. */
static void remember(int fd, const char *path, const void *bytes, size_t len, off_t offset, off_t size) {
    if (mode_is("kill")) return;
    struct change *one = calloc(1, sizeof *one);
    off_t from = bytes ? offset : size;
    size_t old_len = bytes ? len : (size_t)(size < size_of(fd) ? size_of(fd) - size : 0);
    strcpy(one->path, path);
    one->offset = from;
    one->old_size = size_of(fd);
    one->new_size = bytes ? (offset + (off_t)len > one->old_size ? offset + (off_t)len : one->old_size) : size;
    one->old_bytes = malloc(old_len + 1);
    one->new_bytes = malloc(len + 1);
    ssize_t got = pread(fd, one->old_bytes, old_len, from);
    one->old_len = got > 0 ? (size_t)got : 0;
    one->new_len = bytes ? len : 0;
    if (bytes) memcpy(one->new_bytes, bytes, len);
    one->older = newest;
    if (newest) newest->newer = one; else oldest = one;
    newest = one;
}

static void forget(const char *path) {
    for (struct change *one = oldest; one;) {
        struct change *next = one->newer;
        if (strcmp(one->path, path) == 0) {
            if (one->older) one->older->newer = next; else oldest = next;
            if (next) next->older = one->older; else newest = one->older;
            free(one->old_bytes);
            free(one->new_bytes);
            free(one);
        }
        one = next;
    }
}

static void put(const struct change *one, const char *bytes, size_t len, off_t size) {
    int fd = open(one->path, O_RDWR);
    if (fd < 0) return;
    if (REAL(pwrite)(fd, bytes, len, one->offset) < 0 || REAL(ftruncate)(fd, size) < 0) abort();
    close(fd);
}

/* What the disk has after a power cut. */
static void lose_unsynced(void) {
    for (struct change *one = newest; one; one = one->older)
        put(one, one->old_bytes, one->old_len, one->old_size);
    uint64_t seed = number("CRASH_SEED") * 2 + 1;
    for (struct change *one = oldest; mode_is("torn") && one; one = one->newer) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        if (seed % 3 == 0) continue;
        size_t len = seed % 3 == 1 ? one->new_len : one->new_len / 2;
        int fd = open(one->path, O_RDWR);
        off_t now = fd < 0 ? 0 : size_of(fd);
        if (fd >= 0) close(fd);
        off_t size = one->new_len ? (one->offset + (off_t)len > now ? one->offset + (off_t)len : now) : one->new_size;
        put(one, one->new_bytes, len, size);
    }
}

/* Under the lock, before every operation on a ledger; does not return from the last. */
static void step(void) {
    count_up();
    uint64_t at = number("CRASH_AT");
    if (!at || *counter != at) return;
    if (!mode_is("kill")) lose_unsynced();
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static ssize_t write_at(int fd, const void *bytes, size_t len, off_t offset, int moves) {
    char path[PATH_MAX];
    if (!ledger_path(fd, path))
        return moves ? REAL(write)(fd, bytes, len) : REAL(pwrite)(fd, bytes, len, offset);
    pthread_mutex_lock(&lock);
    if (moves) offset = lseek(fd, 0, SEEK_CUR);
    remember(fd, path, bytes, len, offset, 0);
    step();
    ssize_t done = moves ? REAL(write)(fd, bytes, len) : REAL(pwrite)(fd, bytes, len, offset);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *bytes, size_t len) { return write_at(fd, bytes, len, 0, 1); }

ssize_t pwrite(int fd, const void *bytes, size_t len, off_t offset) {
    return write_at(fd, bytes, len, offset, 0);
}

ssize_t pwrite64(int fd, const void *bytes, size_t len, off64_t offset) {
    return write_at(fd, bytes, len, offset, 0);
}

static int truncate_to(int fd, off_t size) {
    char path[PATH_MAX];
    if (!ledger_path(fd, path)) return REAL(ftruncate)(fd, size);
    pthread_mutex_lock(&lock);
    step();
    remember(fd, path, NULL, 0, 0, size);
    int done = REAL(ftruncate)(fd, size);
    pthread_mutex_unlock(&lock);
    return done;
}

int ftruncate(int fd, off_t size) { return truncate_to(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_to(fd, size); }

static int sync_of(int fd, int (*done)(int)) {
    char path[PATH_MAX];
    if (!ledger_path(fd, path)) return done(fd);
    pthread_mutex_lock(&lock);
    step();
    int result = done(fd);
    if (result == 0) forget(path);
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int fd) { return sync_of(fd, REAL(fsync)); }
int fdatasync(int fd) { return sync_of(fd, REAL(fdatasync)); }

int rename(const char *from, const char *to) {
    if (!is_ledger(from) && !is_ledger(to)) return REAL(rename)(from, to);
    pthread_mutex_lock(&lock);
    step();
    int done = REAL(rename)(from, to);
    pthread_mutex_unlock(&lock);
    return done;
}

int unlink(const char *path) {
    if (!is_ledger(path)) return REAL(unlink)(path);
    pthread_mutex_lock(&lock);
    step();
    forget(path);
    int done = REAL(unlink)(path);
    pthread_mutex_unlock(&lock);
    return done;
}
