/* A time of day that jumps, for one process: preloaded, it adds the seconds in the file VSQL_TEST_CLOCK.
 *
 * libfaketime 0.9.10 does this and more, but its clock_nanosleep fails where monotonic time is left alone, and
 * Python sleeps with that. Here only the time of day is another one, and waits until a time of day last as long
 * as they would: a wait for "now + 1 s" ends after a second.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t zero = 0;
static const volatile int64_t *offset = &zero;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("VSQL_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) offset = page;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *at, int base) {
    return base == TIME_UTC && !clock_gettime(CLOCK_REALTIME, at) ? base : 0;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    /* glibc notes in this bit that a condition was made for the monotonic clock. */
    if (cond->__data.__wrefs & 2) return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, until);
    struct timespec real = *until;
    real.tv_sec -= *offset;
    return pthread_cond_clockwait(cond, mutex, CLOCK_REALTIME, &real);
}

/* What librdkafka's waits resolve to. */
int cnd_timedwait(cnd_t *cond, mtx_t *mutex, const struct timespec *until) {
    switch (pthread_cond_timedwait((pthread_cond_t *)cond, (pthread_mutex_t *)mutex, until)) {
        case 0: return thrd_success;
        case ETIMEDOUT: return thrd_timedout;
        default: return thrd_error;
    }
}
