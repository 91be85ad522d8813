/* Writing to a stream that its other end has closed raises SIGPIPE, which ends a program that has not told otherwise.
   send(2) has a flag against it, sendfile(2) has not: the thread blocks the signal meanwhile. */

#ifndef LLM_DATADIST_QUIET_PIPE_H
#define LLM_DATADIST_QUIET_PIPE_H

#include <pthread.h>
#include <signal.h>
#include <time.h>

static inline void quiet_pipe_begin(sigset_t *before)
{
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, before);
}

/* Gives up a signal that was raised meanwhile, and lets the thread be as before. */
static inline void quiet_pipe_end(const sigset_t *before)
{
    if (!sigismember(before, SIGPIPE)) {
        const struct timespec at_once = {0, 0};
        sigset_t pipe;
        sigemptyset(&pipe);
        sigaddset(&pipe, SIGPIPE);
        while (sigtimedwait(&pipe, NULL, &at_once) > 0)
            ;
    }
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

#endif
