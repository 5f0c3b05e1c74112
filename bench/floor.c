/*
 * The least a peer of QEMU's checkpoint loop can do: the floor that stop times are compared with.
 *
 *     floor SOCKET EPOCH_US COUNT CAPACITY
 *
 * SOCKET is our end of the migration's socketpair, inherited. Takes the first pass and throws it away, until a
 * byte comes on stdin: QEMU has said `colo`, and what the socket then holds is the pass's end. After that, COUNT
 * times: read the checkpoint into one buffer of CAPACITY bytes, which was touched beforehand, find its end by
 * looking at the record headers as they come, and answer. Nothing is checked, kept, or sent anywhere.
 *
 * Prints a line per checkpoint: pages, bytes of RAM sections, bytes of device state, nanoseconds from our REPLY
 * to our LOADED. The messages are those of curling_fd/capture/colo.py, the records of curling_fd/vmstate.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { REPLY = 2, RECEIVED = 5, LOADED = 6 };

static int sock;
static uint8_t *buffer;
static size_t capacity, have;

static void die(const char *what)
{
    fprintf(stderr, "floor: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void say(const uint32_t *messages, size_t count)
{
    uint32_t wire[2];
    for (size_t i = 0; i < count; i++)
        wire[i] = __builtin_bswap32(messages[i]);
    if (send(sock, wire, count * 4, MSG_NOSIGNAL) != (ssize_t)(count * 4))
        die("send");
}

/* Have at least `wanted` bytes in the buffer; take as many more as are there. */
static inline void need(size_t wanted)
{
    while (have < wanted) {
        ssize_t count = recv(sock, buffer + have, capacity - have, 0);
        if (count <= 0)
            die("QEMU closed the migration, or the buffer is full");
        have += count;
    }
}

static inline uint64_t be64(size_t at)
{
    uint64_t value;
    memcpy(&value, buffer + at, 8);
    return __builtin_bswap64(value);
}

static inline uint32_t be16(size_t at)
{
    return buffer[at] << 8 | buffer[at + 1];
}

static void first_pass(void)
{
    static const uint8_t shut[8] = {0, 1, 0, 4};
    struct pollfd both[2] = {{sock, POLLIN, 0}, {0, POLLIN, 0}};
    int answered = 0;

    for (;;) {
        ssize_t count = recv(sock, buffer, 4 << 20, MSG_DONTWAIT);
        if (count > 0 && !answered) {
            /* The end of the return path, without which QEMU 11 does not enter the loop. */
            if (send(sock, shut, sizeof shut, MSG_NOSIGNAL) != sizeof shut)
                die("send");
            answered = 1;
        }
        if (count > 0)
            continue;
        if (count == 0)
            die("QEMU closed the migration");
        if (both[1].revents)
            return;
        poll(both, 2, -1);
    }
}

/* The end of the RAM sections that begin at the start of the buffer; counts pages. */
static size_t ram_sections(uint64_t *pages)
{
    size_t at = 0;

    for (;;) {
        need(at + 1);
        uint8_t type = buffer[at];
        if (type == 0x00)
            return at + 1;
        if (type == 0x08) { /* a command */
            need(at + 5);
            at += 5 + be16(at + 3);
            continue;
        }
        if (type != 0x02 && type != 0x03)
            die("a section that does not belong here");
        at += 5;
        for (;;) {
            need(at + 8);
            uint64_t header = be64(at);
            at += 8;
            if (header & 0x10)
                break;
            if (!(header & 0x0a))
                continue;
            if (!(header & 0x20)) {
                need(at + 1);
                at += 1 + buffer[at];
            }
            at += header & 0x08 ? 4096 : 1;
            ++*pages;
        }
        at += 5; /* the footer */
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        die("usage: floor SOCKET EPOCH_US COUNT CAPACITY");
    sock = atoi(argv[1]);
    uint64_t epoch_ns = strtoull(argv[2], NULL, 10) * 1000;
    long count = atol(argv[3]);
    capacity = strtoull(argv[4], NULL, 10);
    buffer = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffer == MAP_FAILED)
        die("mmap");
    uint64_t (*taken)[4] = calloc(count, sizeof *taken);

    first_pass();
    say((uint32_t[]){0}, 1); /* CHECKPOINT_READY */
    uint64_t due = now_ns();
    for (long i = 0; i < count; i++) {
        have = 0;
        need(4); /* CHECKPOINT_REQUEST */
        struct timespec at = {due / 1000000000, due % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);

        uint64_t started = now_ns();
        due = started + epoch_ns;
        have = 0;
        say((uint32_t[]){REPLY}, 1);
        while (have < 4) { /* VMSTATE_SEND, and no more, so that the checkpoint starts the buffer */
            ssize_t got = recv(sock, buffer + have, 4 - have, 0);
            if (got <= 0)
                die("QEMU closed the migration");
            have += got;
        }
        have = 0;
        size_t ram = ram_sections(&taken[i][0]);
        need(ram + 12);
        size_t device = be64(ram + 4);
        need(ram + 12 + device);
        say((uint32_t[]){RECEIVED, LOADED}, 2);
        taken[i][1] = ram;
        taken[i][2] = device;
        taken[i][3] = now_ns() - started;
    }
    for (long i = 0; i < count; i++)
        printf("%lu %lu %lu %lu\n", taken[i][0], taken[i][1], taken[i][2], taken[i][3]);
    fflush(stdout);
    /* The socket stays open until our starter has ended the session: QEMU has nothing to complain about. */
    char byte;
    while (read(0, &byte, 1) > 0)
        ;
    return 0;
}
