/*
 * The guest that watches its own memory: pid 1 of the lab's Linux guest (see initramfs.py).
 *
 * It owns a region of N pages. What a page must hold follows from its index and the round it was last
 * written in. A round is: compare every word of every page with what it must hold, then rewrite M pages.
 * Pages are shared out to one thread per CPU, so on -smp 2 both CPUs dirty memory.
 *
 * Page:   word 0 MAGIC, 1 index, 2 round, 3..510 a generator seeded with (index, round), 511 the sum of all
 *         before it.
 * Ledger: the round each page was last written in; kept with a weighted sum of it, so that an old page
 *         cannot hide behind an equally old piece of ledger.
 *
 * Kernel command line (all optional):
 *   curling.pages=4096     N
 *   curling.dirty=256      M, pages rewritten in a round
 *   curling.pause_us=1000  microseconds between two rounds
 *   curling.report_ms=200  milliseconds between two reports at least; 0 reports every round
 *   curling.threads=0      0: one per CPU
 *   curling.mode=verify    or "dirty": a round is one store into each of the first M pages, nothing is checked
 *   curling.send_to=       an IPv4 address: numbered datagrams go to its port 9 (discard), MAGIC and the number, each
 *                          eight bytes, from 1 on
 *   curling.send_gap_us=1000  microseconds between two of them
 *   curling.serve=1        TCP: port 7 answers each line with how many lines there were on all connections; 19 sends
 *                          numbers of eight bytes, 1, 2, 3 ... for as long as somebody reads; 9 takes such numbers and
 *                          answers the end of them with how many there were, or 0 if one was not the next
 *
 * Says on ttyS0:
 *   curling ready pages=4096 threads=2 mode=verify
 *   curling round=123 corrupt=0 uptime_ms=4567      corrupt: pages found wrong since the start
 *   curling bad page=7 round=120 found_index=7 found_round=119     (the first few of them)
 *   curling ok d 100                                before doing it
 *
 * Takes lines from ttyS0:
 *   p  power off         r  reboot        c  panic
 *   d N  M is N now      s N  pause_us is N now
 *   x N  flip a bit of page N behind the ledger's back (to see the check at work)
 *   v  look at every block of the disks
 *
 * Its disks are seen to in guest_disk.c.
 */
#define _GNU_SOURCE
#include "guest.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define WORDS 512
#define MAGIC 0x3147504c52554347ull /* "GCURLPG1" */
#define MOST_BAD_LINES 8

static uint64_t (*region)[WORDS];
static uint64_t *ledger;
static uint64_t ledger_sum;

static uint64_t pages, dirty, pause_us, report_ms, threads;
static int dirty_mode;

static uint64_t round_number, cursor; /* changed by the leader only, between the barriers */
static _Atomic uint64_t corrupt;
static pthread_barrier_t barrier;
static int tty;

static uint64_t uptime_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

void say(const char *line, int length)
{
    while (length > 0) {
        ssize_t written = write(tty, line, length);
        if (written > 0) {
            line += written;
            length -= written;
        }
    }
}

uint64_t seed_of(uint64_t index, uint64_t written)
{
    uint64_t x = index * 0x9e3779b97f4a7c15ull + written * 0xbf58476d1ce4e5b9ull + 1;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void fill(uint64_t index, uint64_t written)
{
    uint64_t *page = region[index], x = seed_of(index, written);
    uint64_t sum = MAGIC + index + written;

    page[0] = MAGIC;
    page[1] = index;
    page[2] = written;
    for (int i = 3; i < WORDS - 1; i++) {
        page[i] = x;
        sum += x;
        x = next_of(x);
    }
    page[WORDS - 1] = sum;
}

static int is_right(uint64_t index, uint64_t written)
{
    const uint64_t *page = region[index];
    uint64_t x = seed_of(index, written), wrong = 0;
    uint64_t sum = MAGIC + index + written;

    wrong |= (page[0] ^ MAGIC) | (page[1] ^ index) | (page[2] ^ written);
    for (int i = 3; i < WORDS - 1; i++) {
        wrong |= page[i] ^ x;
        sum += x;
        x = next_of(x);
    }
    return !(wrong | (page[WORDS - 1] ^ sum));
}

/* The pages of `worker` are those whose index is `worker` modulo the number of threads. */
static void verify_share(uint64_t worker)
{
    for (uint64_t index = worker; index < pages; index += threads) {
        if (is_right(index, ledger[index]))
            continue;
        if (atomic_fetch_add(&corrupt, 1) < MOST_BAD_LINES)
            SAY("curling bad page=%lu round=%lu found_index=%lu found_round=%lu\n", index, ledger[index],
                region[index][1], region[index][2]);
        fill(index, ledger[index]); /* so that it is counted once */
    }
}

static void verify_ledger(void)
{
    uint64_t sum = 0;
    for (uint64_t index = 0; index < pages; index++)
        sum += ledger[index] * (2 * index + 1);
    if (sum != ledger_sum) {
        if (atomic_fetch_add(&corrupt, 1) < MOST_BAD_LINES)
            SAY("curling bad ledger sum=%lu want=%lu\n", sum, ledger_sum);
        ledger_sum = sum;
    }
}

static void rewrite_share(uint64_t worker)
{
    for (uint64_t k = 0; k < dirty; k++) {
        uint64_t index = (cursor + k) % pages;
        if (index % threads == worker)
            fill(index, round_number);
    }
}

static void enter_ledger(void)
{
    for (uint64_t k = 0; k < dirty; k++) {
        uint64_t index = (cursor + k) % pages;
        ledger_sum += (round_number - ledger[index]) * (2 * index + 1);
        ledger[index] = round_number;
    }
    cursor = (cursor + dirty) % pages;
}

static void touch_share(uint64_t worker)
{
    for (uint64_t index = worker; index < dirty; index += threads)
        *(volatile uint64_t *)&region[index][0] = round_number;
}

/* What every thread does in a round; the leader changes shared state only outside of it. */
static void work(uint64_t worker)
{
    pthread_barrier_wait(&barrier);
    if (dirty_mode) {
        touch_share(worker);
    } else {
        verify_share(worker);
        rewrite_share(worker); /* own pages only, and those have just been verified */
    }
    pthread_barrier_wait(&barrier);
}

static void *worker_main(void *argument)
{
    for (;;)
        work((uintptr_t)argument);
    return NULL;
}

struct sender {
    struct sockaddr_in to;
    uint64_t gap_us;
};

/* Numbers go up by one whatever becomes of the datagram: one that is missing was lost on its way. */
static void *send_numbers(void *argument)
{
    const struct sender *sender = argument;
    struct timespec gap = {sender->gap_us / 1000000, sender->gap_us % 1000000 * 1000};
    uint64_t content[2] = {MAGIC, 0};
    int sock = socket(AF_INET, SOCK_DGRAM, 0);

    for (;;) {
        content[1]++;
        while (sendto(sock, content, sizeof content, 0, (const void *)&sender->to, sizeof sender->to) < 0)
            nanosleep(&(struct timespec){0, 1000000}, NULL);
        if (sender->gap_us)
            nanosleep(&gap, NULL);
    }
    return NULL;
}

static void start_sender(const char *cmdline, uint64_t gap_us)
{
    static struct sender sender;
    static char address[16];
    const char *found = strstr(cmdline, "curling.send_to=");
    pthread_t thread;

    if (!found)
        return;
    sscanf(found, "curling.send_to=%15[0-9.]", address);
    sender.to = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(9)};
    sender.gap_us = gap_us;
    if (inet_pton(AF_INET, address, &sender.to.sin_addr) == 1)
        pthread_create(&thread, NULL, send_numbers, &sender);
}

static int put(int sock, const void *data, size_t length)
{
    const char *from = data;
    while (length > 0) {
        ssize_t sent = send(sock, from, length, MSG_NOSIGNAL);
        if (sent <= 0)
            return 0;
        from += sent;
        length -= sent;
    }
    return 1;
}

static void *count_lines(void *argument)
{
    static _Atomic uint64_t lines;
    int sock = (intptr_t)argument;
    char got[64], answer[32];
    ssize_t length;

    while ((length = recv(sock, got, sizeof got, 0)) > 0)
        for (ssize_t i = 0; i < length; i++)
            if (got[i] == '\n' && !put(sock, answer, sprintf(answer, "%lu\n", (uint64_t)++lines)))
                break;
    close(sock);
    return NULL;
}

static void *send_stream(void *argument)
{
    int sock = (intptr_t)argument;
    uint64_t numbers[1024], next = 1;

    do {
        for (size_t i = 0; i < 1024; i++)
            numbers[i] = next++;
    } while (put(sock, numbers, sizeof numbers));
    close(sock);
    return NULL;
}

static void *take_stream(void *argument)
{
    int sock = (intptr_t)argument;
    uint64_t numbers[1024], count = 0, right = 1;
    ssize_t length;

    while ((length = recv(sock, numbers, sizeof numbers, MSG_WAITALL)) > 0)
        for (ssize_t i = 0; i < length / 8; i++)
            right &= numbers[i] == ++count;
    count *= right;
    put(sock, &count, sizeof count);
    close(sock);
    return NULL;
}

struct service {
    uint16_t port;
    void *(*serve)(void *);
};

static void *listen_for(void *argument)
{
    const struct service *service = argument;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(service->port)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    if (bind(listener, (const void *)&here, sizeof here) || listen(listener, 8))
        SAY("curling cannot listen port=%u\n", service->port);
    for (;;) {
        int sock = accept(listener, NULL, NULL), one = 1;
        pthread_t thread;

        if (sock < 0)
            continue;
        setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        pthread_create(&thread, NULL, service->serve, (void *)(intptr_t)sock);
        pthread_detach(thread);
    }
    return NULL;
}

static void start_services(void)
{
    static const struct service services[] = {{7, count_lines}, {19, send_stream}, {9, take_stream}};
    for (size_t i = 0; i < sizeof services / sizeof *services; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, listen_for, (void *)&services[i]);
    }
}

static void set_dirty(uint64_t wanted)
{
    dirty = wanted < pages ? wanted : pages;
}

static void obey(const char *command)
{
    uint64_t number = strtoull(command[0] ? command + 1 : command, NULL, 10);
    int fd;

    if (!command[0])
        return;
    if (!strchr("prcdsxv", command[0])) {
        SAY("curling unknown %s\n", command);
        return;
    }
    SAY("curling ok %s\n", command);
    tcdrain(tty);
    switch (command[0]) {
    case 'p':
        reboot(RB_POWER_OFF);
        break;
    case 'r':
        reboot(RB_AUTOBOOT);
        break;
    case 'c':
        fd = open("/proc/sysrq-trigger", O_WRONLY);
        if (write(fd, "c", 1) < 0)
            SAY("curling no sysrq\n");
        break;
    case 'd':
        set_dirty(number);
        break;
    case 's':
        pause_us = number;
        break;
    case 'x':
        region[number % pages][WORDS / 2] ^= 1;
        break;
    case 'v':
        check_disks();
        break;
    }
}

static void read_commands(void)
{
    static char line[64];
    static size_t length;
    char buffer[64];
    ssize_t count = read(tty, buffer, sizeof buffer);

    for (ssize_t i = 0; i < count; i++) {
        if (buffer[i] == '\n' || buffer[i] == '\r') {
            line[length] = 0;
            length = 0;
            obey(line);
        } else if (length < sizeof line - 1) {
            line[length++] = buffer[i];
        }
    }
}

static void wait_for_round(void)
{
    struct timespec pause = {pause_us / 1000000, pause_us % 1000000 * 1000};
    struct pollfd input = {tty, POLLIN, 0};

    if (ppoll(&input, 1, &pause, NULL) > 0)
        read_commands();
}

uint64_t parameter(const char *cmdline, const char *name, uint64_t otherwise)
{
    const char *found = strstr(cmdline, name);
    return found ? strtoull(found + strlen(name), NULL, 10) : otherwise;
}

static void open_tty(void)
{
    struct termios mode;

    tty = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (tty < 0)
        tty = 1;
    if (!tcgetattr(tty, &mode)) {
        cfmakeraw(&mode);
        tcsetattr(tty, TCSANOW, &mode);
    }
}

static void *allocate(uint64_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        SAY("curling no memory for %lu bytes\n", size);
        reboot(RB_POWER_OFF);
    }
    return memory;
}

int main(void)
{
    static char cmdline[4096];
    uint64_t reported = 0;
    int fd = open("/proc/cmdline", O_RDONLY);

    open_tty();
    if (read(fd, cmdline, sizeof cmdline - 1) < 0)
        SAY("curling no command line\n");
    close(fd);
    pages = parameter(cmdline, "curling.pages=", 4096);
    set_dirty(parameter(cmdline, "curling.dirty=", 256));
    pause_us = parameter(cmdline, "curling.pause_us=", 1000);
    report_ms = parameter(cmdline, "curling.report_ms=", 200);
    threads = parameter(cmdline, "curling.threads=", 0);
    dirty_mode = strstr(cmdline, "curling.mode=dirty") != NULL;
    if (!threads)
        threads = sysconf(_SC_NPROCESSORS_ONLN);

    region = allocate(pages * sizeof *region);
    ledger = allocate(pages * sizeof *ledger);
    for (uint64_t index = 0; index < pages; index++)
        fill(index, 0);

    pthread_barrier_init(&barrier, NULL, threads);
    for (uintptr_t worker = 1; worker < threads; worker++) {
        pthread_t thread;
        pthread_create(&thread, NULL, worker_main, (void *)worker);
    }
    start_sender(cmdline, parameter(cmdline, "curling.send_gap_us=", 1000));
    if (parameter(cmdline, "curling.serve=", 0))
        start_services();
    start_disks(cmdline);
    SAY("curling ready pages=%lu threads=%lu mode=%s\n", pages, threads, dirty_mode ? "dirty" : "verify");

    for (;;) {
        round_number++;
        if (!dirty_mode)
            verify_ledger();
        work(0);
        if (!dirty_mode)
            enter_ledger();
        if (round_number == 1 || uptime_ms() - reported >= report_ms) {
            reported = uptime_ms();
            SAY("curling round=%lu corrupt=%lu uptime_ms=%lu\n", round_number, (uint64_t)corrupt, reported);
            report_disks();
        }
        wait_for_round();
    }
}
