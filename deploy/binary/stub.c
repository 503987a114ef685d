/* The first part of the file `kuaishang`: unpacks what follows it, once, and starts Python from there.
 *
 * The file is this program, a gzip of a tar archive, and a last line: where the archive begins, an id made from the
 * content, and the CRC-32 of all before it, which every start checks. The archive is unpacked to CACHE/ID, at first
 * under another name: what has that name is complete. A process that runs from such a folder holds a shared lock on it;
 * whoever unpacks another build removes the folders that nobody holds. The copies of upgrades.py stay: if the file is
 * not as it was built, `serve` starts the one that proved itself last.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

#define LAST_LINE 64
#define CRC 9 /* its last bytes */
#define CALLED "KUAISHANG_CALLED"

static char cache[PATH_MAX - 64], tree[PATH_MAX], fresh[PATH_MAX];

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *place)
{
    (void)status, (void)type, (void)place;
    return remove(path);
}

static void remove_tree(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

static void fail(const char *what, const char *path)
{
    fprintf(stderr, "kuaishang: %s %s: %s\n", what, path, strerror(errno));
    if (fresh[0])
        remove_tree(fresh);
    exit(1);
}

/* Return where the archive begins, and its id; 0 if the file is not as it was built. */
static off_t check(int file, const char *path, char *id)
{
    struct stat status;
    char line[LAST_LINE + 1] = "";
    long long start = 0;
    off_t end = fstat(file, &status) ? 0 : status.st_size;
    unsigned char *content = end > LAST_LINE ? mmap(NULL, end, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (content != MAP_FAILED)
        memcpy(line, content + end - LAST_LINE, LAST_LINE);
    if (sscanf(line, "\nkuaishang %lld %32[0-9a-f] ", &start, id) != 2 || line[LAST_LINE - 1] != '\n'
        || crc32_z(0, content, end - CRC) != strtoul(line + LAST_LINE - CRC, NULL, 16)) {
        fprintf(stderr, "kuaishang: %s is damaged or not complete; copy it again\n", path);
        return 0;
    }
    munmap(content, end);
    return start;
}

/* Open `cache` if it exists or can be made, nobody else may write to it, and programs may run from it. */
static int open_cache(void)
{
    struct stat status;
    struct statvfs system;
    mkdir(cache, 0700);
    int folder = open(cache, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (folder >= 0 && !fstat(folder, &status) && status.st_uid == geteuid() && !(status.st_mode & 022)
        && !faccessat(folder, ".", W_OK, AT_EACCESS) && !fstatvfs(folder, &system) && !(system.f_flag & ST_NOEXEC))
        return folder;
    if (folder >= 0)
        close(folder);
    return -1;
}

/* Find the first folder that will do. systemd sets CACHE_DIRECTORY. */
static int find_cache(void)
{
    static const char *const own[][2] = {{"CACHE_DIRECTORY", ""}, {"XDG_CACHE_HOME", ""}, {"HOME", "/.cache"}};
    static const char *const shared[] = {"/var/tmp", "/tmp"};
    int folder;
    for (int i = 0; i < 3; i++) {
        const char *base = getenv(own[i][0]);
        if (base == NULL || base[0] != '/' || strlen(base) > PATH_MAX / 2)
            continue;
        mkdir((snprintf(cache, sizeof cache, "%s%s", base, own[i][1]), cache), 0700);
        snprintf(cache, sizeof cache, "%s%s/kuaishang", base, own[i][1]);
        if ((folder = open_cache()) >= 0)
            return folder;
    }
    for (int i = 0; i < 2; i++) {
        snprintf(cache, sizeof cache, "%s/kuaishang-%u", shared[i], geteuid());
        if ((folder = open_cache()) >= 0)
            return folder;
    }
    fputs("kuaishang: no folder to unpack to; set XDG_CACHE_HOME to one that is yours and may hold programs\n", stderr);
    exit(1);
}

/* Lock a folder for as long as this process and the children of its kind live; -1 if it does not exist. */
static int hold(const char *path)
{
    struct stat opened, there;
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (folder >= 0 && !flock(folder, LOCK_SH) && !fstat(folder, &opened) && !stat(path, &there)
        && opened.st_ino == there.st_ino)
        return folder;
    if (folder >= 0)
        close(folder); /* it was removed while we waited */
    return -1;
}

static void unpack(int file, off_t start, int folder)
{
    struct {
        char name[100], mode[8], owner[16], size[12], time[12], sum[8], type, link[100], magic[88], prefix[155], rest[12];
    } head;
    static char data[1 << 18], path[PATH_MAX];
    gzFile archive = lseek(file, start, SEEK_SET) == start ? gzdopen(dup(file), "rb") : NULL;
    if (archive == NULL)
        fail("cannot unpack to", fresh);
    gzbuffer(archive, sizeof data);
    while (gzread(archive, &head, sizeof head) == sizeof head && head.name[0]) {
        snprintf(path, sizeof path, "%.155s%s%.100s", head.prefix, head.prefix[0] ? "/" : "", head.name);
        if (head.type == '5') {
            if (mkdirat(folder, path, 0700))
                fail("cannot make", path);
            continue;
        }
        int out = openat(folder, path, O_WRONLY | O_CREAT | O_EXCL, (mode_t)strtol(head.mode, NULL, 8));
        if (out < 0)
            fail("cannot write", path);
        for (long left = strtol(head.size, NULL, 8), part; left > 0; left -= part) {
            part = left < (long)sizeof data ? left : (long)sizeof data;
            long padded = (part + 511) / 512 * 512;
            errno = ENOSPC; /* of a write that writes less */
            if (gzread(archive, data, padded) != padded || write(out, data, part) != part)
                fail("cannot write", path);
        }
        close(out);
    }
    gzclose(archive);
    if (syncfs(folder)) /* after a power cut the name must not be there without the content */
        fail("cannot write to", fresh);
}

/* Remove what nobody runs from, but for the copies. */
static void clean(const char *id)
{
    DIR *entries = opendir(cache);
    char path[PATH_MAX], gone[PATH_MAX];
    for (struct dirent *entry; entries != NULL && (entry = readdir(entries)) != NULL;) {
        const char *name = entry->d_name;
        if (!strcmp(name, id) || !strcmp(name, ".") || !strcmp(name, "..") || !strncmp(name, "served-", 7))
            continue;
        snprintf(path, sizeof path, "%s/%.40s", cache, name);
        snprintf(gone, sizeof gone, "%s/.gone", cache); /* half removed it must not have its name */
        int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (folder >= 0 && !flock(folder, LOCK_EX | LOCK_NB)) {
            remove_tree(gone);
            if (!rename(path, gone) || !strcmp(path, gone))
                remove_tree(gone);
        }
        if (folder >= 0)
            close(folder);
    }
    if (entries != NULL)
        closedir(entries);
}

int main(int argc, char **argv)
{
    char id[33], path[PATH_MAX], libraries[PATH_MAX], python[PATH_MAX], program[PATH_MAX];
    const char *given = (const char *)getauxval(AT_EXECFN);
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (file < 0 && (file = open(given, O_RDONLY | O_CLOEXEC)) < 0)
        fail("cannot read", given);
    if (given[0] == '/' || getcwd(program, sizeof program) == NULL)
        program[0] = '\0';
    snprintf(path, sizeof path, "%s%s%s", program, program[0] ? "/" : "", strncmp(given, "./", 2) ? given : given + 2);
    int copy = getenv(CALLED) != NULL; /* which was started for the file at that path */
    if (copy)
        snprintf(path, sizeof path, "%s", getenv(CALLED));
    unsetenv(CALLED);
    off_t start = check(file, given, id);
    if (start == 0 && (copy || (argc > 1 && strcmp(argv[1], "serve"))))
        exit(1);
    int folder = find_cache();
    if (start == 0) {
        setenv(CALLED, path, 1);
        snprintf(program, sizeof program, "%s/served-%08lx/current/kuaishang", cache, crc32_z(0, (void *)path, strlen(path)));
        execv(program, argv);
        exit(1); /* there is none */
    }
    snprintf(tree, sizeof tree, "%s/%s", cache, id);
    if (hold(tree) < 0) {
        flock(folder, LOCK_EX); /* the first one unpacks, the others wait */
        if (hold(tree) < 0) {
            mode_t mask = umask(022);
            snprintf(fresh, sizeof fresh, "%s/.new", cache);
            remove_tree(fresh); /* of one that was killed */
            int lock = mkdir(fresh, 0700) ? -1 : hold(fresh);
            if (lock < 0)
                fail("cannot make", fresh);
            unpack(file, start, lock);
            if (rename(fresh, tree))
                fail("cannot make", tree);
            umask(mask);
            clean(id);
        }
    }
    close(folder);
    close(file);

    setenv("KUAISHANG_FILE", path, 1);
    snprintf(libraries, sizeof libraries, "%s/lib", tree);
    setenv("LD_LIBRARY_PATH", libraries, 1);
    setenv("PYTHONNOUSERSITE", "1", 1);
    unsetenv("PYTHONHOME"), unsetenv("PYTHONPATH");
    snprintf(python, sizeof python, "%s/bin/python3", tree);
    snprintf(program, sizeof program, "%s/app/deploy/binary/kuaishang.py", tree);
    char **arguments = calloc(argc + 3, sizeof *arguments);
    arguments[0] = python, arguments[1] = "-I", arguments[2] = program;
    for (int i = 1; i < argc; i++)
        arguments[i + 2] = argv[i];
    execv(python, arguments);
    fail("cannot start", python);
}
