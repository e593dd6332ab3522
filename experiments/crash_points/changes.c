/* Counts the changes that a process and its children make to files below one folder, and interrupts the n-th.

   Loaded with LD_PRELOAD, where it stands between a program and the C library; does nothing until `changes_watch` is
   called. Forked processes go on with the same count; programs that they execute are not watched. A write through a shared memory map is counted when the map is
   made. Changes of times and permissions are not counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum mode { COUNT, KILL, TORN, FULL, KILL_GROUP };

#define GROUPS 256

/* Shared by all processes of a run. */
struct run {
    pthread_mutex_t lock; /* held while a change is made, so that changes have one order */
    long count;           /* changes so far */
    int disk_is_full;
    pid_t groups[GROUPS]; /* process groups to kill */
};

static struct run *run;
static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1;
static enum mode mode;
static long target; /* number of the change to interrupt, from 1; 0 for none */

#define REAL(type, name, ...)                                                                                          \
    static type (*real_##name)(__VA_ARGS__);                                                                           \
    if (!real_##name)                                                                                                  \
    real_##name = dlsym(RTLD_NEXT, #name)

/* --- Paths ------------------------------------------------------------------------------------------------------- */

static int is_watched(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == '\0');
}

/* The path behind a descriptor, if it is watched. */
static int path_of_descriptor(int descriptor, char *path) {
    char link[64];
    if (!run)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    path[length] = '\0';
    return is_watched(path);
}

/* The absolute path of `name` as seen from a directory, if it is watched. Symbolic links are not followed. */
static int absolute_path(int directory, const char *name, char *path) {
    if (!run || !name)
        return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return is_watched(path);
    }
    char base[PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length <= 0)
            return 0;
        base[length] = '\0';
    }
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX)
        return 0;
    return is_watched(path);
}

/* --- Changes ----------------------------------------------------------------------------------------------------- */

static void kill_processes(void) {
    if (mode == KILL_GROUP) {
        pthread_mutex_unlock(&run->lock); /* which the processes of other groups go on to use */
    } else {
        for (int i = 0; i < GROUPS; i++)
            if (run->groups[i] && run->groups[i] != getpgrp())
                kill(-run->groups[i], SIGKILL);
    }
    kill(0, SIGKILL);
    for (;;)
        pause();
}

enum verdict { PROCEED, REFUSE, HALF };

/* Called before each change, with the lock taken; `finish` gives it back.
   `takes_space`: the change needs room on the disk. `bytes`: of a write, else 0. */
static enum verdict begin(const char *kind, const char *path, size_t bytes, int takes_space) {
    pthread_mutex_lock(&run->lock);
    if (run->disk_is_full && takes_space)
        return REFUSE;
    long number = ++run->count;
    if (log_file >= 0)
        dprintf(log_file, "%ld\t%s\t%zu\t%s\n", number, kind, bytes, path);
    if (number != target)
        return PROCEED;
    if (mode == KILL || mode == KILL_GROUP)
        kill_processes();
    if (mode == TORN)
        return bytes > 1 ? HALF : PROCEED;
    if (mode == FULL) {
        run->disk_is_full = 1;
        if (takes_space)
            return bytes > 1 ? HALF : REFUSE;
    }
    return PROCEED;
}

static void finish(void) {
    int error = errno;
    pthread_mutex_unlock(&run->lock);
    errno = error;
}

/* After half of a write: the process dies, or goes on with a disk that is full. */
static void after_half(void) {
    if (mode == TORN)
        kill_processes();
}

#define CHANGE(kind, path, takes_space, call)                                                                          \
    do {                                                                                                               \
        if (begin(kind, path, 0, takes_space) == REFUSE) {                                                             \
            errno = ENOSPC;                                                                                            \
            finish();                                                                                                  \
            return -1;                                                                                                 \
        }                                                                                                              \
        int result_ = call;                                                                                            \
        finish();                                                                                                      \
        return result_;                                                                                                \
    } while (0)

/* `half` is the call with half of the bytes. */
#define WRITE(kind, path, bytes, call, half)                                                                           \
    do {                                                                                                               \
        enum verdict verdict_ = begin(kind, path, bytes, 1);                                                           \
        if (verdict_ == REFUSE) {                                                                                      \
            errno = ENOSPC;                                                                                            \
            finish();                                                                                                  \
            return -1;                                                                                                 \
        }                                                                                                              \
        ssize_t result_ = verdict_ == HALF ? half : call;                                                              \
        if (verdict_ == HALF)                                                                                          \
            after_half();                                                                                              \
        finish();                                                                                                      \
        return result_;                                                                                                \
    } while (0)

/* --- Opening ----------------------------------------------------------------------------------------------------- */

/* "create" or "truncate", where opening does either; else NULL. */
static const char *change_of_open(const char *path, int flags) {
    struct stat status;
    if (stat(path, &status) != 0)
        return flags & O_CREAT ? "create" : NULL;
    if (!S_ISREG(status.st_mode) || (flags & O_EXCL && flags & O_CREAT))
        return NULL;
    return flags & O_TRUNC && (flags & O_ACCMODE) != O_RDONLY && status.st_size > 0 ? "truncate" : NULL;
}

static int open_watched(int directory, const char *name, int flags, mode_t permissions) {
    REAL(int, openat, int, const char *, int, ...);
    char path[PATH_MAX];
    const char *kind = NULL;
    if (flags & (O_CREAT | O_TRUNC) && absolute_path(directory, name, path))
        kind = change_of_open(path, flags);
    if (!kind)
        return real_openat(directory, name, flags, permissions);
    CHANGE(kind, path, kind[0] == 'c', real_openat(directory, name, flags, permissions));
}

static mode_t permissions_of(int flags, va_list arguments) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode_t permissions = permissions_of(flags, arguments);                                                         \
        va_end(arguments);                                                                                             \
        return open_watched(AT_FDCWD, path, flags, permissions);                                                       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode_t permissions = permissions_of(flags, arguments);                                                         \
        va_end(arguments);                                                                                             \
        return open_watched(directory, path, flags, permissions);                                                      \
    }
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t permissions) {
    return open_watched(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permissions);
}

int creat64(const char *path, mode_t permissions) {
    return creat(path, permissions);
}

/* Of the C library's streams, opening and `fwrite`; each is flushed, so that the change is made when it is counted. */
static FILE *open_stream(const char *name, const char *how, FILE *(*real)(const char *, const char *)) {
    char path[PATH_MAX];
    const char *kind = NULL;
    int flags = how[0] == 'w' ? O_CREAT | O_TRUNC | O_WRONLY : how[0] == 'a' ? O_CREAT | O_WRONLY : 0;
    if (flags && absolute_path(AT_FDCWD, name, path))
        kind = change_of_open(path, flags);
    if (!kind)
        return real(name, how);
    if (begin(kind, path, 0, kind[0] == 'c') == REFUSE) {
        errno = ENOSPC;
        finish();
        return NULL;
    }
    FILE *stream = real(name, how);
    finish();
    return stream;
}

FILE *fopen(const char *name, const char *how) {
    REAL(FILE *, fopen, const char *, const char *);
    return open_stream(name, how, real_fopen);
}

FILE *fopen64(const char *name, const char *how) {
    REAL(FILE *, fopen64, const char *, const char *);
    return open_stream(name, how, real_fopen64);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    char path[PATH_MAX];
    if (!path_of_descriptor(fileno(stream), path))
        return real_fwrite(data, size, count, stream);
    enum verdict verdict = begin("write", path, size * count, 1);
    if (verdict == REFUSE) {
        errno = ENOSPC;
        finish();
        return 0;
    }
    size_t written = verdict == HALF ? real_fwrite(data, 1, size * count / 2, stream) / size
                                     : real_fwrite(data, size, count, stream);
    fflush(stream);
    if (verdict == HALF)
        after_half();
    finish();
    return written;
}

/* --- Writing ----------------------------------------------------------------------------------------------------- */

ssize_t write(int descriptor, const void *data, size_t bytes) {
    REAL(ssize_t, write, int, const void *, size_t);
    char path[PATH_MAX];
    if (!path_of_descriptor(descriptor, path))
        return real_write(descriptor, data, bytes);
    WRITE("write", path, bytes, real_write(descriptor, data, bytes), real_write(descriptor, data, bytes / 2));
}

#define PWRITE(name)                                                                                                   \
    ssize_t name(int descriptor, const void *data, size_t bytes, off_t offset) {                                       \
        REAL(ssize_t, name, int, const void *, size_t, off_t);                                                         \
        char path[PATH_MAX];                                                                                           \
        if (!path_of_descriptor(descriptor, path))                                                                     \
            return real_##name(descriptor, data, bytes, offset);                                                       \
        WRITE("write", path, bytes, real_##name(descriptor, data, bytes, offset),                                      \
              real_##name(descriptor, data, bytes / 2, offset));                                                       \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

static size_t bytes_of(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += parts[i].iov_len;
    return bytes;
}

static ssize_t write_half(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, write, int, const void *, size_t);
    size_t left = bytes_of(parts, count) / 2;
    ssize_t written = 0;
    for (int i = 0; i < count && left; i++) {
        size_t bytes = parts[i].iov_len < left ? parts[i].iov_len : left;
        ssize_t result = real_write(descriptor, parts[i].iov_base, bytes);
        if (result < 0)
            return written ? written : -1;
        written += result;
        left -= bytes;
    }
    return written;
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    char path[PATH_MAX];
    if (!path_of_descriptor(descriptor, path))
        return real_writev(descriptor, parts, count);
    WRITE("write", path, bytes_of(parts, count), real_writev(descriptor, parts, count),
          write_half(descriptor, parts, count));
}

#define SENDFILE(name)                                                                                                 \
    ssize_t name(int target_file, int source, off_t *offset, size_t bytes) {                                           \
        REAL(ssize_t, name, int, int, off_t *, size_t);                                                                \
        char path[PATH_MAX];                                                                                           \
        struct stat status;                                                                                            \
        if (!path_of_descriptor(target_file, path))                                                                    \
            return real_##name(target_file, source, offset, bytes);                                                    \
        off_t from = offset ? *offset : lseek(source, 0, SEEK_CUR);                                                    \
        size_t left = fstat(source, &status) == 0 && from >= 0 && from < status.st_size ? status.st_size - from : 0;   \
        if (left == 0) /* callers ask until nothing is left */                                                         \
            return real_##name(target_file, source, offset, bytes);                                                    \
        left = left < bytes ? left : bytes;                                                                            \
        WRITE("write", path, left, real_##name(target_file, source, offset, bytes),                                    \
              real_##name(target_file, source, offset, left / 2));                                                     \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int source, off64_t *from, int target_file, off64_t *to, size_t bytes, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    char path[PATH_MAX];
    if (!path_of_descriptor(target_file, path))
        return real_copy_file_range(source, from, target_file, to, bytes, flags);
    WRITE("write", path, bytes, real_copy_file_range(source, from, target_file, to, bytes, flags),
          real_copy_file_range(source, from, target_file, to, bytes / 2, flags));
}

#define TRUNCATE_DESCRIPTOR(name)                                                                                      \
    int name(int descriptor, off_t length) {                                                                           \
        REAL(int, name, int, off_t);                                                                                   \
        char path[PATH_MAX];                                                                                           \
        if (!path_of_descriptor(descriptor, path))                                                                     \
            return real_##name(descriptor, length);                                                                    \
        CHANGE("truncate", path, 0, real_##name(descriptor, length));                                                  \
    }
TRUNCATE_DESCRIPTOR(ftruncate)
TRUNCATE_DESCRIPTOR(ftruncate64)

#define TRUNCATE(name)                                                                                                 \
    int name(const char *file, off_t length) {                                                                         \
        REAL(int, name, const char *, off_t);                                                                          \
        char path[PATH_MAX];                                                                                           \
        if (!absolute_path(AT_FDCWD, file, path))                                                                      \
            return real_##name(file, length);                                                                          \
        CHANGE("truncate", path, 0, real_##name(file, length));                                                        \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

#define ALLOCATE(name)                                                                                                 \
    int name(int descriptor, int how, off_t offset, off_t length) {                                                    \
        REAL(int, name, int, int, off_t, off_t);                                                                       \
        char path[PATH_MAX];                                                                                           \
        if (!path_of_descriptor(descriptor, path))                                                                     \
            return real_##name(descriptor, how, offset, length);                                                       \
        CHANGE("allocate", path, 1, real_##name(descriptor, how, offset, length));                                     \
    }
ALLOCATE(fallocate)
ALLOCATE(fallocate64)

#define MAP(name)                                                                                                      \
    void *name(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {                \
        char path[PATH_MAX];                                                                                           \
        if (run && descriptor >= 0 && protection & PROT_WRITE && (flags & MAP_TYPE) == MAP_SHARED &&                   \
            path_of_descriptor(descriptor, path)) {                                                                    \
            begin("map", path, 0, 0);                                                                                  \
            finish();                                                                                                  \
        }                                                                                                              \
        return (void *)syscall(SYS_mmap, address, length, protection, flags, descriptor, offset);                      \
    }
MAP(mmap)
MAP(mmap64)

/* --- Names ------------------------------------------------------------------------------------------------------- */

static int rename_watched(int from, const char *before, int to, const char *after, unsigned flags) {
    char path[PATH_MAX];
    if (!absolute_path(to, after, path) && !absolute_path(from, before, path))
        return syscall(SYS_renameat2, from, before, to, after, flags);
    CHANGE("rename", path, 0, syscall(SYS_renameat2, from, before, to, after, flags));
}

int rename(const char *before, const char *after) {
    return rename_watched(AT_FDCWD, before, AT_FDCWD, after, 0);
}

int renameat(int from, const char *before, int to, const char *after) {
    return rename_watched(from, before, to, after, 0);
}

int renameat2(int from, const char *before, int to, const char *after, unsigned flags) {
    return rename_watched(from, before, to, after, flags);
}

/* Looked at first, so that what does not exist is no change. */
static int unlink_watched(int directory, const char *name, int flags) {
    char path[PATH_MAX];
    struct stat status;
    if (!absolute_path(directory, name, path) || lstat(path, &status) != 0)
        return syscall(SYS_unlinkat, directory, name, flags);
    CHANGE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, 0, syscall(SYS_unlinkat, directory, name, flags));
}

int unlink(const char *name) {
    return unlink_watched(AT_FDCWD, name, 0);
}

int unlinkat(int directory, const char *name, int flags) {
    return unlink_watched(directory, name, flags);
}

int rmdir(const char *name) {
    return unlink_watched(AT_FDCWD, name, AT_REMOVEDIR);
}

int remove(const char *name) {
    struct stat status;
    int is_folder = lstat(name, &status) == 0 && S_ISDIR(status.st_mode);
    return unlink_watched(AT_FDCWD, name, is_folder ? AT_REMOVEDIR : 0);
}

int mkdirat(int directory, const char *name, mode_t permissions) {
    char path[PATH_MAX];
    struct stat status;
    if (!absolute_path(directory, name, path) || lstat(path, &status) == 0)
        return syscall(SYS_mkdirat, directory, name, permissions);
    CHANGE("mkdir", path, 1, syscall(SYS_mkdirat, directory, name, permissions));
}

int mkdir(const char *name, mode_t permissions) {
    return mkdirat(AT_FDCWD, name, permissions);
}

int linkat(int from, const char *before, int to, const char *after, int flags) {
    char path[PATH_MAX];
    if (!absolute_path(to, after, path))
        return syscall(SYS_linkat, from, before, to, after, flags);
    CHANGE("link", path, 1, syscall(SYS_linkat, from, before, to, after, flags));
}

int link(const char *before, const char *after) {
    return linkat(AT_FDCWD, before, AT_FDCWD, after, 0);
}

int symlinkat(const char *before, int to, const char *after) {
    char path[PATH_MAX];
    if (!absolute_path(to, after, path))
        return syscall(SYS_symlinkat, before, to, after);
    CHANGE("symlink", path, 1, syscall(SYS_symlinkat, before, to, after));
}

int symlink(const char *before, const char *after) {
    return symlinkat(before, AT_FDCWD, after);
}

/* --- Renaming without the C library ------------------------------------------------------------------------------- */

/* Rust's `tempfile`, with which safetensors are saved, makes the system call itself. The kernel is asked to signal it
   instead; what is called here is another system call. */
#if defined(__x86_64__) || defined(__aarch64__)
#ifdef __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#define ARGUMENT(context, i) ((context)->uc_mcontext.gregs[(int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10}[i]])
#define RESULT(context) ((context)->uc_mcontext.gregs[REG_RAX])
#else
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define ARGUMENT(context, i) ((context)->uc_mcontext.regs[i])
#define RESULT(context) ((context)->uc_mcontext.regs[0])
#endif

static void rename_in_place_of_kernel(int number, siginfo_t *info, void *state) {
    ucontext_t *context = state;
    int error = errno;
    (void)number, (void)info;
    int result = rename_watched((int)ARGUMENT(context, 0), (const char *)ARGUMENT(context, 1),
                                (int)ARGUMENT(context, 2), (const char *)ARGUMENT(context, 3), 0);
    RESULT(context) = result < 0 ? -errno : result;
    errno = error;
}

static void intercept_renameat(void) {
    struct sigaction action = {.sa_sigaction = rename_in_place_of_kernel, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    sigaction(SIGSYS, &action, NULL);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
}
#else
static void intercept_renameat(void) {}
#endif

/* --- Called from Python ------------------------------------------------------------------------------------------- */

/* The process group of the caller dies with the others when a run is killed. */
void changes_add_group(pid_t group) {
    for (int i = 0; i < GROUPS; i++)
        if (__sync_bool_compare_and_swap(&run->groups[i], 0, group))
            return;
    abort();
}

/* To be called when all processes of a group have ended, since its number may then be given to others. */
void changes_remove_group(pid_t group) {
    for (int i = 0; i < GROUPS; i++)
        __sync_bool_compare_and_swap(&run->groups[i], group, 0);
}

/* Watch the changes below `folder` from now on. `log` gets a line for each: number, kind, bytes, path, with tabs
   between. `mode` and `number` say which change is interrupted, and how. Returns 0, or -1 where `log` cannot be
   written. */
int changes_watch(const char *folder, const char *log, int chosen_mode, long number) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    mode = chosen_mode;
    target = number;
    log_file = syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
    void *memory = mmap(NULL, sizeof *run, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (log_file < 0 || memory == MAP_FAILED)
        return -1;
    struct run *shared = memory;
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&shared->lock, &attributes);
    run = shared;
    changes_add_group(getpgrp());
    intercept_renameat();
    return 0;
}
