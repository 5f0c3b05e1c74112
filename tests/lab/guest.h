/* What the parts of the lab's Linux guest share; see guest.c. */
#include <stdint.h>
#include <stdio.h>

/* Write a line to the console, whole. */
void say(const char *line, int length);

#define SAY(...)                                                           \
    do {                                                                   \
        char line_[160];                                                   \
        say(line_, snprintf(line_, sizeof line_, __VA_ARGS__));            \
    } while (0)

/* A number that follows from two others and looks like nothing. */
uint64_t seed_of(uint64_t index, uint64_t written);

static inline uint64_t next_of(uint64_t x)
{
    return x * 6364136223846793005ull + 1442695040888963407ull;
}

/* The value of `name` ("curling.x=") on the kernel's command line. */
uint64_t parameter(const char *cmdline, const char *name, uint64_t otherwise);

/* guest_disk.c */
void start_disks(const char *cmdline);
void report_disks(void);
void check_disks(void);
