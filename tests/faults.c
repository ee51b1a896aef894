/* The faults of a file system, for LD_PRELOAD (Linux, glibc).

   Counts the calls of this process that change what lies below one folder, whichever language makes them. At one of
   them the process gets a signal (KILL; TEAR: amid a write; POWER: and what was not brought to disk by fsync is gone), or
   the disk is full: what needs room fails with ENOSPC,
   from then on (FULL; SHORT: after half a write) or this once (ONCE), while renaming and removing still work. Nothing
   happens before faults_arm. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, TEAR, POWER, FULL, SHORT, ONCE, INTERRUPT, TERMINATE, STOP };
enum verdict { GO, HALF, REFUSE };
enum room { NEVER, ALWAYS, AT_SYNC };

static char folder[PATH_MAX];
static size_t length;
static enum mode mode;
static long number;
static int journal = -1;
static atomic_long calls;
static atomic_int struck;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* where: a real path. at: the call that fails, from 1 on. log: a file outside of the folder, a line per call. */
void faults_arm(const char *where, int how, long at, const char *log) {
    strncpy(folder, where, sizeof folder - 1);
    length = strlen(folder);
    mode = how;
    number = at;
    journal = REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
}

static int inside(const char *path) {
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static const char *of_fd(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size < 0 ? 0 : size] = 0;
    return out;
}

/* The path with the links of its parent resolved, not its own. */
static const char *at_path(int dir, const char *path, char *out) {
    char whole[2 * PATH_MAX], real[PATH_MAX], base[PATH_MAX] = "";
    if (!length)
        return strcpy(out, "");
    if (path[0] != '/' && dir == AT_FDCWD && !getcwd(base, sizeof base))
        base[0] = 0;
    else if (path[0] != '/' && dir != AT_FDCWD)
        of_fd(dir, base);
    snprintf(whole, sizeof whole, "%s%s%s", base, path[0] == '/' ? "" : "/", path);
    char *last = strrchr(whole, '/');
    *last = 0;
    char *parent = realpath(*whole ? whole : "/", real) ? real : whole;
    if (snprintf(out, PATH_MAX, "%s/%s", parent, last + 1) >= PATH_MAX)
        abort();
    return out;
}

/* ---- what is on disk ---- */

static struct {
    dev_t device;
    ino_t inode;
    int fd;
    off_t size;
} written[1024];
static atomic_int files;

/* A file is about to be written (on_disk 0), or has been brought to disk. */
static void note(int fd, int on_disk) {
    struct stat now;
    int at = 0, before = errno;
    if (mode != POWER || fstat(fd, &now))
        return;
    while (at < files && (written[at].device != now.st_dev || written[at].inode != now.st_ino))
        at++;
    if (at == files && !on_disk) {
        if (++files > 1024)
            abort();
        written[at].device = now.st_dev;
        written[at].inode = now.st_ino;
        written[at].fd = fcntl(fd, F_DUPFD_CLOEXEC, 100);
        written[at].size = now.st_size;
    } else if (at < files && on_disk)
        written[at].size = now.st_size;
    errno = before;
}

static void lose_the_rest(void) {
    struct stat now;
    for (int at = 0; at < files; at++)
        if (!fstat(written[at].fd, &now) && now.st_size > written[at].size)
            syscall(SYS_ftruncate, written[at].fd, written[at].size);
}

/* ---- a call is met ---- */

static void send(int what) { syscall(SYS_kill, getpid(), what); }

static enum verdict meet(const char *call, const char *path, enum room room) {
    if (!inside(path))
        return GO;
    int before = errno;
    long now = atomic_fetch_add(&calls, 1) + 1;
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%s %s\n", call, path + length);
    if (syscall(SYS_write, journal, line, size) != size)
        abort();
    errno = before;
    if (mode == COUNT || now < number)
        return GO;
    int writes = !strncmp(call, "write", 5);
    if (mode == TEAR && now == number && writes)
        return HALF;
    int signal = mode == KILL || mode == TEAR || mode == POWER ? SIGKILL
                 : mode == INTERRUPT                           ? SIGINT
                 : mode == TERMINATE                           ? SIGTERM
                 : mode == STOP                                ? SIGSTOP
                                                               : 0;
    if (signal && now == number) {
        lose_the_rest();
        send(signal);
    }
    if (signal || room == NEVER || (room == AT_SYNC && now != number))
        return GO;
    int again = atomic_fetch_add(&struck, 1);
    if (mode == ONCE && again)
        return GO;
    return mode == SHORT && !again && writes ? HALF : REFUSE;
}

/* What is there already is opened, or said to be there, on a full disk too. */
static enum room unless_there(const char *path) { return access(path, F_OK) ? ALWAYS : NEVER; }

static int refused(void) {
    errno = ENOSPC;
    return -1;
}

/* One call that changes the folder, unless it is refused. */
#define GUARD(call, path, room, real)                                                              \
    do {                                                                                           \
        if (meet(call, path, room) != GO)                                                          \
            return refused();                                                                      \
        return real;                                                                               \
    } while (0)

/* ---- files are opened ---- */

static int opens(const char *path, int flags) {
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC)))
        return 0;
    return meet("open", path, flags & O_CREAT ? unless_there(path) : NEVER) != GO;
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        char buffer[PATH_MAX];                                                                     \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                              \
        return opens(at_path(AT_FDCWD, path, buffer), flags) ? refused()                           \
                                                             : REAL(name)(path, flags, rights);    \
    }
#define OPENAT(name)                                                                               \
    int name(int dir, const char *path, int flags, ...) {                                          \
        char buffer[PATH_MAX];                                                                     \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                              \
        return opens(at_path(dir, path, buffer), flags) ? refused()                                \
                                                        : REAL(name)(dir, path, flags, rights);    \
    }
#define CREAT(name)                                                                                \
    int name(const char *path, mode_t rights) {                                                    \
        char buffer[PATH_MAX];                                                                     \
        return opens(at_path(AT_FDCWD, path, buffer), O_CREAT | O_WRONLY | O_TRUNC)                \
                   ? refused()                                                                     \
                   : REAL(name)(path, rights);                                                     \
    }
/* C++ streams open so, and then write as below; what C itself writes through a FILE is not seen. */
#define FOPEN(name)                                                                                \
    FILE *name(const char *path, const char *how) {                                                \
        char buffer[PATH_MAX];                                                                     \
        int flags = strpbrk(how, "wa") ? O_CREAT | O_WRONLY : strchr(how, '+') ? O_RDWR : 0;       \
        if (!opens(at_path(AT_FDCWD, path, buffer), flags))                                        \
            return REAL(name)(path, how);                                                          \
        refused();                                                                                 \
        return NULL;                                                                               \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CREAT(creat)
CREAT(creat64)
FOPEN(fopen)
FOPEN(fopen64)

/* ---- files are written ---- */

static const char *target(int fd, char *buffer) {
    return length ? of_fd(fd, buffer) : strcpy(buffer, "");
}

#define WRITE(name, arguments, whole, half)                                                  \
    ssize_t name arguments {                                                                       \
        char buffer[PATH_MAX];                                                                     \
        enum verdict verdict = meet("write", target(fd, buffer), ALWAYS);                          \
        if (inside(buffer))                                                                        \
            note(fd, 0);                                                                           \
        if (verdict == GO)                                                                         \
            return REAL(name) whole;                                                               \
        ssize_t done = verdict == HALF ? half : refused();                                         \
        if (verdict == HALF && mode == TEAR)                                                       \
            send(SIGKILL);                                                                                 \
        return done;                                                                               \
    }

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size),
      REAL(write)(fd, data, (size + 1) / 2))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
      REAL(pwrite)(fd, data, (size + 1) / 2, at))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
      REAL(pwrite64)(fd, data, (size + 1) / 2, at))
WRITE(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count),
      REAL(write)(fd, parts[0].iov_base, (parts[0].iov_len + 1) / 2))
WRITE(pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at),
      REAL(pwrite)(fd, parts[0].iov_base, (parts[0].iov_len + 1) / 2, at))

ssize_t copy_file_range(int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags) {
    char buffer[PATH_MAX];
    GUARD("copy_file_range", target(fd, buffer), ALWAYS,
          REAL(copy_file_range)(from, at, fd, to, size, flags));
}
ssize_t sendfile(int fd, int from, off_t *at, size_t size) {
    char buffer[PATH_MAX];
    GUARD("sendfile", target(fd, buffer), ALWAYS, REAL(sendfile)(fd, from, at, size));
}
ssize_t sendfile64(int fd, int from, off64_t *at, size_t size) {
    char buffer[PATH_MAX];
    GUARD("sendfile", target(fd, buffer), ALWAYS, REAL(sendfile64)(fd, from, at, size));
}
int ftruncate(int fd, off_t size) {
    char buffer[PATH_MAX];
    GUARD("ftruncate", target(fd, buffer), size ? ALWAYS : NEVER, REAL(ftruncate)(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    char buffer[PATH_MAX];
    GUARD("ftruncate", target(fd, buffer), size ? ALWAYS : NEVER, REAL(ftruncate64)(fd, size));
}
int posix_fallocate(int fd, off_t at, off_t size) {
    char buffer[PATH_MAX];
    return meet("fallocate", target(fd, buffer), ALWAYS) != GO ? ENOSPC
                                                               : REAL(posix_fallocate)(fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    char buffer[PATH_MAX];
    return meet("fallocate", target(fd, buffer), ALWAYS) != GO
               ? ENOSPC
               : REAL(posix_fallocate64)(fd, at, size);
}
int fsync(int fd) {
    char buffer[PATH_MAX];
    if (meet("fsync", target(fd, buffer), AT_SYNC) != GO)
        return refused();
    int failed = REAL(fsync)(fd);
    if (!failed)
        note(fd, 1);
    return failed;
}
int fdatasync(int fd) {
    char buffer[PATH_MAX];
    if (meet("fsync", target(fd, buffer), AT_SYNC) != GO)
        return refused();
    int failed = REAL(fdatasync)(fd);
    if (!failed)
        note(fd, 1);
    return failed;
}

int flock(int fd, int how) {
    char buffer[PATH_MAX];
    GUARD("flock", target(fd, buffer), NEVER, REAL(flock)(fd, how));
}

/* ---- names are made, moved and removed ---- */

int mkdir(const char *path, mode_t rights) {
    char buffer[PATH_MAX];
    at_path(AT_FDCWD, path, buffer);
    GUARD("mkdir", buffer, unless_there(buffer), REAL(mkdir)(path, rights));
}
int mkdirat(int dir, const char *path, mode_t rights) {
    char buffer[PATH_MAX];
    at_path(dir, path, buffer);
    GUARD("mkdir", buffer, unless_there(buffer), REAL(mkdirat)(dir, path, rights));
}
int symlink(const char *to, const char *path) {
    char buffer[PATH_MAX];
    GUARD("symlink", at_path(AT_FDCWD, path, buffer), ALWAYS, REAL(symlink)(to, path));
}
int symlinkat(const char *to, int dir, const char *path) {
    char buffer[PATH_MAX];
    GUARD("symlink", at_path(dir, path, buffer), ALWAYS, REAL(symlinkat)(to, dir, path));
}
int link(const char *from, const char *path) {
    char buffer[PATH_MAX];
    GUARD("link", at_path(AT_FDCWD, path, buffer), ALWAYS, REAL(link)(from, path));
}
int linkat(int one, const char *from, int dir, const char *path, int flags) {
    char buffer[PATH_MAX];
    GUARD("link", at_path(dir, path, buffer), ALWAYS, REAL(linkat)(one, from, dir, path, flags));
}
int rename(const char *from, const char *path) {
    char buffer[PATH_MAX];
    GUARD("rename", at_path(AT_FDCWD, path, buffer), NEVER, REAL(rename)(from, path));
}
int renameat(int one, const char *from, int dir, const char *path) {
    char buffer[PATH_MAX];
    GUARD("rename", at_path(dir, path, buffer), NEVER, REAL(renameat)(one, from, dir, path));
}
int renameat2(int one, const char *from, int dir, const char *path, unsigned flags) {
    char buffer[PATH_MAX];
    GUARD("rename", at_path(dir, path, buffer), NEVER, REAL(renameat2)(one, from, dir, path, flags));
}
int unlink(const char *path) {
    char buffer[PATH_MAX];
    GUARD("unlink", at_path(AT_FDCWD, path, buffer), NEVER, REAL(unlink)(path));
}
int unlinkat(int dir, const char *path, int flags) {
    char buffer[PATH_MAX];
    GUARD(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at_path(dir, path, buffer), NEVER,
          REAL(unlinkat)(dir, path, flags));
}
int rmdir(const char *path) {
    char buffer[PATH_MAX];
    GUARD("rmdir", at_path(AT_FDCWD, path, buffer), NEVER, REAL(rmdir)(path));
}
int truncate(const char *path, off_t size) {
    char buffer[PATH_MAX];
    GUARD("truncate", at_path(AT_FDCWD, path, buffer), NEVER, REAL(truncate)(path, size));
}
