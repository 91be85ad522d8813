/* The host touches a device pointer: the process ends, as on hardware, but is told what it touched. */
#include "internal.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static struct sigaction before[2];
static const int signals[2] = {SIGSEGV, SIGBUS};
static bool watching;

static void tell(int number, siginfo_t *info, void *unused)
{
    (void)unused;
    if (sim_is_device_address(info->si_addr)) {
        char what[160], line[320];
        sim_range_describe_unlocked((uintptr_t)info->si_addr, what, sizeof what);
        int length =
            snprintf(line, sizeof line,
                     "ascend simulator: misuse host_deref in process %d: the host touches %p, device memory of %s\n",
                     (int)getpid(), info->si_addr, what);
        ssize_t ignored = write(STDERR_FILENO, line, (size_t)length);
        (void)ignored;
    }
    /* Back to whoever was here before, and once more through the instruction that failed. */
    sigaction(number, &before[number == SIGBUS], NULL);
}

void sim_dereference_watch(void)
{
    if (watching)
        return;
    struct sigaction own = {.sa_sigaction = tell, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    for (int i = 0; i < 2; i++)
        sigaction(signals[i], &own, &before[i]);
    watching = true;
}

void sim_dereference_forget(void)
{
    for (int i = 0; i < 2 && watching; i++) {
        struct sigaction now;
        if (!sigaction(signals[i], NULL, &now) && now.sa_sigaction == tell)
            sigaction(signals[i], &before[i], NULL);
    }
    watching = false;
}
