/*
 * The guest that watches its disks: virtio-blk disks vda, vdb ... are written by threads of their own.
 *
 * A writer has a share of a disk's blocks and does one thing after the other, number 1, 2, 3 ... of its own.
 * Which blocks, how many, and what is done to them follows from writer and number; each block then holds a stamp
 * of them. The next is begun when the one before is done. So of every share there is exactly one right content
 * for each number: one write too few, too many, or out of order shows. What each block must hold is in memory,
 * and every block that is to be overwritten is compared with it before: a disk that is not of the same moment as
 * the memory shows, too. tests/lab/stamps.py tells the same of an image from outside.
 *
 * Block:  word 0 DISK_MAGIC, 1 its index on the disk, 2 writer, 3 number, 4.. a generator seeded with (index, number),
 *         the last one the sum of all before it. A block that was zeroed is all zero.
 *
 * Kernel command line:
 *   curling.disks=0        how many disks
 *   curling.writers=1      threads for each
 *   curling.block=4096     bytes of a block
 *   curling.disk_gap_us=0  microseconds between two writes of a writer
 *   curling.disk_most=0    numbers after which it stops; 0 never
 *
 * Says with each report (see guest.c), and after the command "v", which looks at every block:
 *   curling disk=vda writer=0 number=123 bad=0
 *   curling disk=vda writer=0 checked=1024 bad=0
 *   curling bad disk=vda block=7 want=120 found=119     (the first few of them)
 */
#define _GNU_SOURCE
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define DISK_MAGIC 0x31314b5344524743ull /* "CGRDSK11" */
#define MOST_BLOCKS 8
#define MOST_BAD_LINES 8
#define MOST_WRITERS 64

/* What is done with a number. DISCARDED is discarded, and then written. */
enum { WRITTEN, ZEROED, DISCARDED };

struct writer {
    char disk[16];
    int fd;
    uint64_t id;           /* unique in this guest */
    uint64_t first, count; /* its share, in blocks */
    uint64_t *ledger;      /* the number that each block of it was last touched by; 0: never */
    uint64_t *buffer;
    _Atomic uint64_t number, bad;
    _Atomic int check;
};

static struct writer writers[MOST_WRITERS];
static uint64_t writer_count, block_size, gap_us, most;

static void choose(const struct writer *writer, uint64_t number, uint64_t *block, uint64_t *blocks, int *how)
{
    uint64_t x = seed_of(writer->id, number);

    *blocks = (x >> 32) % 8 ? 1 : MOST_BLOCKS;
    *block = (uint32_t)x % (writer->count - *blocks + 1);
    *how = (x >> 40) % 16 == 0 ? ZEROED : (x >> 40) % 16 == 1 ? DISCARDED : WRITTEN;
}

static void stamp(const struct writer *writer, uint64_t *words, uint64_t index, uint64_t number)
{
    uint64_t last = block_size / 8 - 1, x = seed_of(index, number), sum = 0;

    words[0] = DISK_MAGIC;
    words[1] = index;
    words[2] = writer->id;
    words[3] = number;
    for (uint64_t i = 4; i < last; i++) {
        words[i] = x;
        x = next_of(x);
    }
    for (uint64_t i = 0; i < last; i++)
        sum += words[i];
    words[last] = sum;
}

/* Compare what was read of a block of the share with what it must hold. */
static void look(struct writer *writer, const uint64_t *words, uint64_t block)
{
    uint64_t wanted[block_size / 8], number = writer->ledger[block], a, b;
    int how;

    if (!number)
        return;
    choose(writer, number, &a, &b, &how);
    if (how == ZEROED)
        memset(wanted, 0, sizeof wanted);
    else
        stamp(writer, wanted, writer->first + block, number);
    if (memcmp(wanted, words, block_size) == 0)
        return;
    if (atomic_fetch_add(&writer->bad, 1) < MOST_BAD_LINES)
        SAY("curling bad disk=%s block=%lu want=%lu found=%lu\n", writer->disk, writer->first + block, number,
            words[0] == DISK_MAGIC ? words[3] : 0);
    writer->ledger[block] = 0; /* so that it is counted once */
}

static void failed(struct writer *writer, const char *what)
{
    SAY("curling disk=%s failed %s errno=%d\n", writer->disk, what, errno);
    writer->bad++;
    sleep(1);
}

static int read_blocks(struct writer *writer, uint64_t block, uint64_t blocks)
{
    ssize_t length = blocks * block_size;
    if (pread(writer->fd, writer->buffer, length, (writer->first + block) * block_size) == length)
        return 1;
    failed(writer, "read");
    return 0;
}

static void check(struct writer *writer)
{
    for (uint64_t block = 0; block < writer->count; block += MOST_BLOCKS) {
        uint64_t blocks = writer->count - block < MOST_BLOCKS ? writer->count - block : MOST_BLOCKS;
        if (read_blocks(writer, block, blocks))
            for (uint64_t k = 0; k < blocks; k++)
                look(writer, writer->buffer + k * block_size / 8, block + k);
    }
    SAY("curling disk=%s writer=%lu checked=%lu bad=%lu\n", writer->disk, writer->id, writer->count,
        (uint64_t)writer->bad);
}

static int next(struct writer *writer)
{
    uint64_t number = writer->number + 1, block, blocks;
    int how, done = 1;

    choose(writer, number, &block, &blocks, &how);
    uint64_t range[2] = {(writer->first + block) * block_size, blocks * block_size};
    if (!read_blocks(writer, block, blocks))
        return 0;
    for (uint64_t k = 0; k < blocks; k++)
        look(writer, writer->buffer + k * block_size / 8, block + k);
    if (how == ZEROED && ioctl(writer->fd, BLKZEROOUT, range))
        done = 0;
    if (how == DISCARDED)
        ioctl(writer->fd, BLKDISCARD, range); /* not every disk can */
    if (how != ZEROED) {
        for (uint64_t k = 0; k < blocks; k++)
            stamp(writer, writer->buffer + k * block_size / 8, writer->first + block + k, number);
        done = pwrite(writer->fd, writer->buffer, range[1], range[0]) == (ssize_t)range[1];
    }
    if (!done) {
        failed(writer, "write");
        return 0;
    }
    for (uint64_t k = 0; k < blocks; k++)
        writer->ledger[block + k] = number;
    writer->number = number;
    return 1;
}

static void *write_on(void *argument)
{
    struct writer *writer = argument;
    struct timespec gap = {gap_us / 1000000, gap_us % 1000000 * 1000};

    for (;;) {
        if (atomic_exchange(&writer->check, 0))
            check(writer);
        if (most && writer->number >= most)
            nanosleep(&(struct timespec){0, 10000000}, NULL);
        else if (next(writer) && gap_us)
            nanosleep(&gap, NULL);
    }
    return NULL;
}

void start_disks(const char *cmdline)
{
    uint64_t disks = parameter(cmdline, "curling.disks=", 0), each = parameter(cmdline, "curling.writers=", 1);

    block_size = parameter(cmdline, "curling.block=", 4096);
    gap_us = parameter(cmdline, "curling.disk_gap_us=", 0);
    most = parameter(cmdline, "curling.disk_most=", 0);
    for (uint64_t disk = 0; disk < disks; disk++) {
        char path[16];
        uint64_t bytes = 0;
        int fd;

        snprintf(path, sizeof path, "/dev/vd%c", (char)('a' + disk));
        fd = open(path, O_RDWR | O_DIRECT);
        if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes)) {
            SAY("curling cannot open %s errno=%d\n", path, errno);
            continue;
        }
        for (uint64_t k = 0; k < each && writer_count < MOST_WRITERS; k++) {
            struct writer *writer = &writers[writer_count];
            pthread_t thread;

            strcpy(writer->disk, path + 5);
            writer->fd = fd;
            writer->id = writer_count++;
            writer->count = bytes / block_size / each;
            writer->first = k * writer->count;
            writer->ledger = calloc(writer->count, sizeof *writer->ledger);
            writer->buffer = aligned_alloc(4096, MOST_BLOCKS * block_size);
            pthread_create(&thread, NULL, write_on, writer);
        }
    }
}

void report_disks(void)
{
    for (uint64_t k = 0; k < writer_count; k++)
        SAY("curling disk=%s writer=%lu number=%lu bad=%lu\n", writers[k].disk, k, (uint64_t)writers[k].number,
            (uint64_t)writers[k].bad);
}

void check_disks(void)
{
    for (uint64_t k = 0; k < writer_count; k++)
        writers[k].check = 1;
}
