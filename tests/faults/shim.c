// A preloaded library that stands between a process and the C library's file system calls.
//
// Nothing happens until `faults_arm`. From then on calls of the chosen kinds on paths below `root` are counted and
// logged, and the k-th of them is where the fault happens:
//
//   COUNT   nowhere: the calls are only counted
//   KILL    the process is killed before the call
//   TEAR    the process is killed in the middle of the call if it writes (half of the bytes), else before it
//   ONCE    the call fails with `error`; later ones work
//   ALWAYS  the call and all later ones fail with `error`
//   SHORT   the call and all later ones that write take at most half of their bytes, as a POSIX write may
//
// A log line is "<number> <kind> <path>\n". Python, Rust (safetensors) and C++ (pyarrow) all come through here. What does
// not: stores through a memory map, io_uring, and calls that the C library makes internally for fopen's later writes.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, TEAR, ONCE, ALWAYS, SHORT };

#define KINDS(X) \
  X(READ_OPEN) X(WRITE_OPEN) X(WRITE) X(SYNC) X(RENAME) X(UNLINK) X(MKDIR) X(TRUNCATE) X(LINK) X(CHMOD) X(UTIME) \
  X(LOCK) X(READ) X(LIST)
#define AS_ENUM(name) name,
#define AS_TEXT(name) #name,
enum kind { KINDS(AS_ENUM) };
static const char* const kind_names[] = {KINDS(AS_TEXT)};

static char root[PATH_MAX];
static size_t root_length;
static enum mode mode;
static long target;
static int error_number;
static unsigned kinds;
static int log_file = -1;
static atomic_int armed;
static atomic_long calls;

// kinds: bit n stands for the n-th kind above. log: a descriptor that stays open.
void faults_arm(const char* folder, int how, long k, int error, unsigned which, int log) {
  root_length = strlen(folder);
  memcpy(root, folder, root_length + 1);
  mode = how, target = k, error_number = error, kinds = which, log_file = log;
  atomic_store(&calls, 0);
  atomic_store(&armed, 1);
}

static int is_below_root(const char* path) {
  return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

// The absolute path of what a call names into `out`; 0 where that is not below the root.
static int place(int folder, const char* path, char* out) {
  char link[64];
  ssize_t length = 0;
  if (path == NULL || path[0] != '/') {
    if (path != NULL && folder == AT_FDCWD) {
      strcpy(link, "/proc/self/cwd");
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    }
    length = readlink(link, out, PATH_MAX - 1);
    if (length < 0) return 0;
    if (path != NULL) out[length++] = '/';
  }
  snprintf(out + length, PATH_MAX - length, "%s", path == NULL ? "" : path);
  return is_below_root(out);
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

enum verdict { PASS, FAIL, HALF, HALF_AND_DIE };

// What is to become of a call. With FAIL errno is set.
static enum verdict verdict(enum kind kind, int folder, const char* path) {
  if (!atomic_load(&armed) || !(kinds & (1u << kind))) return PASS;
  int before = errno;
  char full[PATH_MAX];
  if (!place(folder, path, full)) {
    errno = before;
    return PASS;
  }
  long number = atomic_fetch_add(&calls, 1) + 1;
  char line[PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%ld %s %s\n", number, kind_names[kind], full);
  syscall(SYS_write, log_file, line, length);
  errno = before;
  if (mode == COUNT || number < target) return PASS;
  if (mode == SHORT) return kind == WRITE ? HALF : PASS;
  if (mode == KILL || (mode == TEAR && kind != WRITE)) die();
  if (mode == TEAR) return HALF_AND_DIE;
  if (mode == ONCE && number > target) return PASS;
  errno = error_number;
  return FAIL;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

#define CHECK(kind, folder, path, failure) \
  if (verdict(kind, folder, path) != PASS) return failure

// ---- opening -------------------------------------------------------------------------------------------------------

static enum kind kind_of(int flags) {
  return (flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC)) ? READ_OPEN : WRITE_OPEN;
}

#define MODE_ARGUMENT(flags)                                 \
  mode_t permissions = 0;                                    \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list list;                                            \
    va_start(list, flags);                                   \
    permissions = va_arg(list, mode_t);                      \
    va_end(list);                                            \
  }

#define OPEN(name)                                             \
  int name(const char* path, int flags, ...) {                 \
    MODE_ARGUMENT(flags)                                       \
    CHECK(kind_of(flags), AT_FDCWD, path, -1);                 \
    return REAL(name)(path, flags, permissions);               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                           \
  int name(int folder, const char* path, int flags, ...) {     \
    MODE_ARGUMENT(flags)                                       \
    CHECK(kind_of(flags), folder, path, -1);                   \
    return REAL(name)(folder, path, flags, permissions);       \
  }
OPENAT(openat)
OPENAT(openat64)

int __open_2(const char* path, int flags) { return open(path, flags); }
int __open64_2(const char* path, int flags) { return open64(path, flags); }
int __openat_2(int folder, const char* path, int flags) { return openat(folder, path, flags); }
int __openat64_2(int folder, const char* path, int flags) { return openat64(folder, path, flags); }

#define CREAT(name)                                            \
  int name(const char* path, mode_t permissions) {             \
    CHECK(WRITE_OPEN, AT_FDCWD, path, -1);                     \
    return REAL(name)(path, permissions);                      \
  }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                            \
  FILE* name(const char* path, const char* how) {              \
    CHECK(how[0] == 'r' && !strchr(how, '+') ? READ_OPEN : WRITE_OPEN, AT_FDCWD, path, NULL); \
    return REAL(name)(path, how);                              \
  }
FOPEN(fopen)
FOPEN(fopen64)

DIR* opendir(const char* path) {
  CHECK(LIST, AT_FDCWD, path, NULL);
  return REAL(opendir)(path);
}
DIR* fdopendir(int file) {
  CHECK(LIST, file, NULL, NULL);
  return REAL(fdopendir)(file);
}

// ---- reading and writing -------------------------------------------------------------------------------------------

#define READING(name, parameters, arguments)                   \
  ssize_t name parameters {                                    \
    CHECK(READ, file, NULL, -1);                               \
    return REAL(name) arguments;                               \
  }
READING(read, (int file, void* data, size_t size), (file, data, size))
READING(pread, (int file, void* data, size_t size, off_t at), (file, data, size, at))
READING(pread64, (int file, void* data, size_t size, off64_t at), (file, data, size, at))
READING(readv, (int file, const struct iovec* parts, int count), (file, parts, count))

// Writes of one buffer: half of it is `size` less its larger half.
#define WRITING(name, parameters, arguments)                   \
  ssize_t name parameters {                                    \
    enum verdict what = verdict(WRITE, file, NULL);            \
    if (what == FAIL) return -1;                               \
    if (what == HALF_AND_DIE) size /= 2;                       \
    if (what == HALF && size > 1) size /= 2;                   \
    ssize_t written = REAL(name) arguments;                    \
    if (what == HALF_AND_DIE) die();                           \
    return written;                                            \
  }
WRITING(write, (int file, const void* data, size_t size), (file, data, size))
WRITING(pwrite, (int file, const void* data, size_t size, off_t at), (file, data, size, at))
WRITING(pwrite64, (int file, const void* data, size_t size, off64_t at), (file, data, size, at))
WRITING(sendfile, (int file, int from, off_t* at, size_t size), (file, from, at, size))
WRITING(sendfile64, (int file, int from, off64_t* at, size_t size), (file, from, at, size))
WRITING(copy_file_range, (int from, off64_t* there, int file, off64_t* at, size_t size, unsigned flags),
        (from, there, file, at, size, flags))

#define WRITING_PARTS(name, parameters, arguments, first_only) \
  ssize_t name parameters {                                    \
    enum verdict what = verdict(WRITE, file, NULL);            \
    if (what == FAIL) return -1;                               \
    ssize_t written = what == PASS ? REAL(name) arguments : REAL(name) first_only; \
    if (what == HALF_AND_DIE) die();                           \
    return written;                                            \
  }
WRITING_PARTS(writev, (int file, const struct iovec* parts, int count), (file, parts, count), (file, parts, 1))
WRITING_PARTS(pwritev, (int file, const struct iovec* parts, int count, off_t at), (file, parts, count, at),
              (file, parts, 1, at))
WRITING_PARTS(pwritev64, (int file, const struct iovec* parts, int count, off64_t at), (file, parts, count, at),
              (file, parts, 1, at))

// ---- everything else -----------------------------------------------------------------------------------------------

#define ON_FILE(kind, name, parameters, arguments)             \
  int name parameters {                                        \
    CHECK(kind, file, NULL, -1);                               \
    return REAL(name) arguments;                               \
  }
#define ON_PATH(kind, folder, name, parameters, arguments)     \
  int name parameters {                                        \
    CHECK(kind, folder, path, -1);                             \
    return REAL(name) arguments;                               \
  }

ON_FILE(SYNC, fsync, (int file), (file))
ON_FILE(SYNC, fdatasync, (int file), (file))
ON_FILE(TRUNCATE, ftruncate, (int file, off_t size), (file, size))
ON_FILE(TRUNCATE, ftruncate64, (int file, off64_t size), (file, size))
ON_PATH(TRUNCATE, AT_FDCWD, truncate, (const char* path, off_t size), (path, size))
ON_PATH(TRUNCATE, AT_FDCWD, truncate64, (const char* path, off64_t size), (path, size))
ON_PATH(UNLINK, AT_FDCWD, unlink, (const char* path), (path))
ON_PATH(UNLINK, AT_FDCWD, rmdir, (const char* path), (path))
ON_PATH(UNLINK, AT_FDCWD, remove, (const char* path), (path))
ON_PATH(UNLINK, folder, unlinkat, (int folder, const char* path, int flags), (folder, path, flags))
ON_PATH(MKDIR, AT_FDCWD, mkdir, (const char* path, mode_t permissions), (path, permissions))
ON_PATH(MKDIR, folder, mkdirat, (int folder, const char* path, mode_t permissions), (folder, path, permissions))
ON_PATH(CHMOD, AT_FDCWD, chmod, (const char* path, mode_t permissions), (path, permissions))
ON_FILE(CHMOD, fchmod, (int file, mode_t permissions), (file, permissions))
ON_PATH(CHMOD, folder, fchmodat, (int folder, const char* path, mode_t permissions, int flags),
        (folder, path, permissions, flags))
ON_PATH(UTIME, folder, utimensat, (int folder, const char* path, const struct timespec times[2], int flags),
        (folder, path, times, flags))
ON_FILE(UTIME, futimens, (int file, const struct timespec times[2]), (file, times))
ON_PATH(UTIME, AT_FDCWD, utimes, (const char* path, const struct timeval times[2]), (path, times))
ON_FILE(LOCK, flock, (int file, int operation), (file, operation))

// Of two paths the second one, which comes into being, is the one that counts.
ON_PATH(RENAME, AT_FDCWD, rename, (const char* old, const char* path), (old, path))
ON_PATH(RENAME, folder, renameat, (int from, const char* old, int folder, const char* path), (from, old, folder, path))
ON_PATH(RENAME, folder, renameat2, (int from, const char* old, int folder, const char* path, unsigned flags),
        (from, old, folder, path, flags))
ON_PATH(LINK, AT_FDCWD, link, (const char* old, const char* path), (old, path))
ON_PATH(LINK, folder, linkat, (int from, const char* old, int folder, const char* path, int flags),
        (from, old, folder, path, flags))
ON_PATH(LINK, AT_FDCWD, symlink, (const char* old, const char* path), (old, path))
ON_PATH(LINK, folder, symlinkat, (const char* old, int folder, const char* path), (old, folder, path))
