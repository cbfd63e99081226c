/* Stands between a program and the C library: records what the program does to files under a folder, and lets the n-th
   such call fail, or kills the program before it. Built and preloaded by test_syscalls.py; Linux only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[4096];  /* of the folder that is watched; empty: nothing is */
static int left, error;  /* calls until the one that fails; 0 kills in place of an error */
static FILE *record;

/* For Python: watch a folder. The `at`-th call fails with `code`, or is the last one if that is 0; at 0 none does. */
void watch(const char *folder, int at, int code, const char *log) {
    strcpy(root, folder);
    left = at;
    error = code;
    record = log ? fopen(log, "w") : NULL;
}

static void name_of(int descriptor, const char *path, char *full) {
    char link[64];
    ssize_t length = 0;
    full[0] = 0;
    if (path && path[0] == '/') {
        strcpy(full, path);
        return;
    }
    if (descriptor != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        length = readlink(link, full, 4000);
    } else if (getcwd(full, 4000)) {
        length = strlen(full);
    }
    full[length > 0 ? length : 0] = 0;
    if (path) sprintf(full + strlen(full), "/%s", path);
}

static int is_watched(const char *path) {
    return root[0] && !strncmp(path, root, strlen(root));
}

/* Whether the call may go on; otherwise errno is set. */
static int allowed(const char *path) {
    if (!is_watched(path) || left <= 0 || --left > 0) return 1;
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return 0;
}

/* Write down a call that has succeeded, and pass its result on. */
static long done(long result, const char *call, const char *path, const char *other, const void *data) {
    if (result < 0 || !record || !is_watched(path)) return result;
    fprintf(record, "%s\t%s\t%s\t", call, path, other);
    for (long i = 0; data && i < result; i++) fprintf(record, "%02x", ((const unsigned char *)data)[i]);
    fprintf(record, "\n");
    fflush(record);
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        va_list rest;                                                                         \
        va_start(rest, flags);                                                                \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0;                                   \
        va_end(rest);                                                                         \
        char full[8192];                                                                      \
        struct stat found;                                                                    \
        name_of(AT_FDCWD, path, full);                                                        \
        int is_new = lstat(path, &found) != 0;                                                \
        int makes = flags & O_CREAT && is_new, empties = flags & O_TRUNC && !is_new;          \
        if ((makes || empties) && !allowed(full)) return -1;                                  \
        int result = REAL(name)(path, flags, mode);                                           \
        if (makes || empties) done(result, makes ? "create" : "truncate", full, "", NULL);    \
        return result;                                                                        \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *data, size_t size) {
    char full[8192];
    name_of(descriptor, NULL, full);
    return allowed(full) ? done(REAL(write)(descriptor, data, size), "write", full, "", data) : -1;
}

int fsync(int descriptor) {
    char full[8192];
    name_of(descriptor, NULL, full);
    return allowed(full) ? done(REAL(fsync)(descriptor), "fsync", full, "", NULL) : -1;
}

#define TRUNCATE(name, type)                                                              \
    int name(int descriptor, type length) {                                               \
        char full[8192], size[32];                                                        \
        name_of(descriptor, NULL, full);                                                  \
        snprintf(size, sizeof size, "%lld", (long long)length);                           \
        return allowed(full) ? done(REAL(name)(descriptor, length), "truncate", full, size, NULL) : -1; \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int mkdir(const char *path, mode_t mode) {
    char full[8192];
    name_of(AT_FDCWD, path, full);
    return allowed(full) ? done(REAL(mkdir)(path, mode), "mkdir", full, "", NULL) : -1;
}

#define REMOVE(name, call)                                               \
    int name(const char *path) {                                         \
        char full[8192];                                                 \
        name_of(AT_FDCWD, path, full);                                   \
        return allowed(full) ? done(REAL(name)(path), call, full, "", NULL) : -1;   \
    }
REMOVE(rmdir, "remove")
REMOVE(unlink, "remove")

int unlinkat(int folder, const char *path, int flags) {
    char full[8192];
    name_of(folder, path, full);
    return allowed(full) ? done(REAL(unlinkat)(folder, path, flags), "remove", full, "", NULL) : -1;
}

#define MOVE(name)                                                          \
    int name(const char *from, const char *to) {                            \
        char full[8192], other[8192];                                       \
        name_of(AT_FDCWD, from, full);                                      \
        name_of(AT_FDCWD, to, other);                                       \
        return allowed(full) ? done(REAL(name)(from, to), #name, full, other, NULL) : -1; \
    }
MOVE(rename)
MOVE(link)

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char full[8192], other[8192];
    name_of(from_folder, from, full);
    name_of(to_folder, to, other);
    const char *call = flags == 2 ? "exchange" : "rename";
    return allowed(full) ? done(REAL(renameat2)(from_folder, from, to_folder, to, flags), call, full, other, NULL) : -1;
}
