/*
 * The least that a raw disk costs on its way into an image: no metadata, no options, no checks.
 *
 *   floor DISK > PIPE   Two threads read the first 4 KiB of each 64 KiB cluster, and all of one
 *                       whose head is zeros. Then each run of data leaves by sendfile().
 *   floor < PIPE        The consumer that copies nothing: it splices to /dev/null.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <unistd.h>

enum { HEAD = 4 << 10, CLUSTER = 64 << 10, PIPE_SIZE = 1 << 20 };

static int disk;
static off_t size, count; /* bytes, clusters */
static char *is_data;     /* of each cluster */

static int has_data(char *buffer, size_t length, off_t cluster)
{
    ssize_t got = pread(disk, buffer, length, cluster * CLUSTER);
    return got > 0 && (buffer[0] || memcmp(buffer, buffer + 1, got - 1));
}

static void *scan(void *second_half)
{
    char buffer[CLUSTER];
    off_t end = second_half ? count : count / 2;

    for (off_t i = second_half ? count / 2 : 0; i < end; i++)
        is_data[i] = has_data(buffer, HEAD, i) || has_data(buffer, CLUSTER, i);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t other;

    if (argc < 2) {
        int null = open("/dev/null", O_WRONLY);
        while (splice(0, NULL, null, NULL, PIPE_SIZE, 0) > 0)
            ;
        return 0;
    }
    if ((disk = open(argv[1], O_RDONLY)) < 0 || (size = lseek(disk, 0, SEEK_END)) < 0)
        err(1, "%s", argv[1]);
    fcntl(1, F_SETPIPE_SZ, PIPE_SIZE);
    count = (size + CLUSTER - 1) / CLUSTER;
    is_data = calloc(count + 1, 1);
    if (!is_data || pthread_create(&other, NULL, scan, is_data))
        err(1, "a second thread");
    scan(NULL);
    pthread_join(other, NULL);
    for (off_t i = 0, end; i < count; i = end + 1) {
        for (end = i; is_data[end]; end++)
            ;
        off_t last = end * CLUSTER < size ? end * CLUSTER : size;
        for (off_t start = i * CLUSTER; start < last;)
            if (sendfile(1, disk, &start, last - start) <= 0)
                err(1, "sendfile");
    }
    return 0;
}
