/* A disk that keeps only what was synced, for tests of what survives a power loss. Loaded with LD_PRELOAD into the process
 * under test, it keeps below POWER_LOSS_SHADOW what a disk must hold of the folder POWER_LOSS_ROOT and all in it:
 *
 *   file-<inode>    the content of a file when it was last fsynced or fdatasynced
 *   dir-<inode>     the names in a folder when it was last fsynced: lines of "f|d <inode> <name>"
 *
 * A name is durable only when its folder was synced, a content only when its file was: stricter than most filesystems,
 * which also write back on their own and keep a new file's name with its content. What it does not show: writes between two
 * syncs that reach the disk in another order. The test puts the surviving tree together, from the root's dir-<inode>.
 * Only calls through libc are seen; the engine syncs with std::fs, which makes such calls, and so does sled.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_BYTES 4096

/* One sync at a time: an older copy must not take the place of a newer one. */
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what) {
    dprintf(2, "power_loss shim: cannot %s: %s\n", what, strerror(errno));
    _exit(99); /* A test that lost its shadow must not pass. */
}

static void copy_content(int fd, const char *to) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int in = open(path, O_RDONLY | O_CLOEXEC);
    int out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (in < 0 || out < 0) fail("open a copy");
    char block[1 << 16];
    for (;;) {
        ssize_t count = read(in, block, sizeof block);
        if (count < 0) fail("read");
        if (count == 0) break;
        if (write(out, block, count) != count) fail("write a copy");
    }
    close(in);
    close(out);
}

static void copy_names(const char *folder, const char *to) {
    DIR *entries = opendir(folder);
    FILE *out = fopen(to, "we");
    if (!entries || !out) fail("list a folder");
    struct dirent *entry;
    while ((entry = readdir(entries))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        struct stat about;
        if (fstatat(dirfd(entries), entry->d_name, &about, AT_SYMLINK_NOFOLLOW)) continue; /* Removed meanwhile. */
        if (!S_ISREG(about.st_mode) && !S_ISDIR(about.st_mode)) continue; /* Sockets do not survive. */
        fprintf(out, "%c %lu %s\n", S_ISDIR(about.st_mode) ? 'd' : 'f', (unsigned long)about.st_ino, entry->d_name);
    }
    closedir(entries);
    if (fclose(out)) fail("write names");
}

static void keep(int fd) {
    const char *root = getenv("POWER_LOSS_ROOT"), *shadow = getenv("POWER_LOSS_SHADOW");
    if (!root || !shadow) return;
    char link[64], path[PATH_BYTES], part[PATH_BYTES], whole[PATH_BYTES];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    size_t prefix = strlen(root);
    if (strncmp(path, root, prefix) || (path[prefix] && path[prefix] != '/')) return;
    struct stat about;
    if (fstat(fd, &about)) return;
    int folder = S_ISDIR(about.st_mode);
    snprintf(whole, sizeof whole, "%s/%s-%lu", shadow, folder ? "dir" : "file", (unsigned long)about.st_ino);
    snprintf(part, sizeof part, "%s/part-%d", shadow, (int)getpid());
    if (folder) copy_names(path, part);
    else copy_content(fd, part);
    /* In one instant, so that a process killed while it syncs leaves the former state or the new one. */
    if (rename(part, whole)) fail("keep a copy");
}

static int sync_and_keep(int fd, const char *name) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    pthread_mutex_lock(&one_at_a_time);
    int outcome = real(fd);
    int saved = errno;
    if (outcome == 0) keep(fd);
    pthread_mutex_unlock(&one_at_a_time);
    errno = saved;
    return outcome;
}

int fsync(int fd) { return sync_and_keep(fd, "fsync"); }
int fdatasync(int fd) { return sync_and_keep(fd, "fdatasync"); }
