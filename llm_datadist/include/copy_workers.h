/* Threads that help with large copies: parked when there is nothing to do, one set for the process. They are started with
 * the first job that wants them, and end with the last user.
 *
 * A job is a function that is run by its caller and by helpers at the same time until it says that nothing is left. The
 * caller never waits for a helper to come, only for those that came to leave.
 */
#ifndef LLM_DATADIST_COPY_WORKERS_H
#define LLM_DATADIST_COPY_WORKERS_H

#include <pthread.h>
#include <stdint.h>
#include <sys/prctl.h>

#include "atomics.h"

#define COPY_WORKERS_MAX 63

typedef struct copy_job {
    void (*run)(void *work); /* returns when nothing is left */
    void *work;
    unsigned wanted; /* helpers that may still come */
    unsigned inside; /* helpers that came and have not left */
    struct copy_job *next;
} copy_job;

static struct {
    pthread_mutex_t lock; /* guards everything in here, and the counts of jobs */
    pthread_cond_t more;  /* there is a job, or an end */
    pthread_cond_t left;  /* a helper has left a job */
    copy_job *jobs;
    pthread_t threads[COPY_WORKERS_MAX];
    unsigned running; /* threads */
    unsigned users;   /* who entered and has not left */
    int stopping;
} copy_workers = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, {0}, 0, 0, 0};

static void *copy_worker(void *unused) {
    (void)unused;
    prctl(PR_SET_NAME, "llm_datadist-cp"); /* as tools show it; 15 characters at most */
    pthread_mutex_lock(&copy_workers.lock);
    while (!copy_workers.stopping) {
        copy_job *job = copy_workers.jobs;
        while (job != NULL && job->wanted == 0) {
            job = job->next;
        }
        if (job == NULL) {
            pthread_cond_wait(&copy_workers.more, &copy_workers.lock);
            continue;
        }
        job->wanted--;
        job->inside++;
        pthread_mutex_unlock(&copy_workers.lock);
        job->run(job->work);
        pthread_mutex_lock(&copy_workers.lock);
        if (--job->inside == 0) {
            pthread_cond_broadcast(&copy_workers.left);
        }
    }
    pthread_mutex_unlock(&copy_workers.lock);
    return NULL;
}

/* One more user. Without any, jobs get no help. */
static inline void copy_workers_enter(void) {
    pthread_mutex_lock(&copy_workers.lock);
    copy_workers.users++;
    pthread_mutex_unlock(&copy_workers.lock);
}

/* See to it that there are so many threads, if there may be any. With the lock held. */
static inline void copy_workers_start(unsigned helpers) {
    if (copy_workers.users == 0 || copy_workers.stopping) {
        return;
    }
    while (copy_workers.running < helpers && copy_workers.running < COPY_WORKERS_MAX) {
        if (pthread_create(&copy_workers.threads[copy_workers.running], NULL, copy_worker, NULL) != 0) {
            return; /* copies are only slower */
        }
        copy_workers.running++;
    }
}

/* One user less; the threads end with the last one. No job of that user may be running. */
static inline void copy_workers_leave(void) {
    pthread_mutex_lock(&copy_workers.lock);
    if (--copy_workers.users != 0) {
        pthread_mutex_unlock(&copy_workers.lock);
        return;
    }
    copy_workers.stopping = 1;
    pthread_cond_broadcast(&copy_workers.more);
    unsigned running = copy_workers.running;
    pthread_mutex_unlock(&copy_workers.lock);
    for (unsigned i = 0; i < running; i++) {
        pthread_join(copy_workers.threads[i], NULL);
    }
    pthread_mutex_lock(&copy_workers.lock);
    copy_workers.running = 0;
    copy_workers.stopping = 0;
    pthread_mutex_unlock(&copy_workers.lock);
}

/* Run a job with up to `helpers` parked threads beside the caller. */
static inline void copy_workers_run(void (*run)(void *), void *work, unsigned helpers) {
    copy_job job = {run, work, helpers, 0, NULL};
    pthread_mutex_lock(&copy_workers.lock);
    copy_workers_start(helpers);
    job.next = copy_workers.jobs;
    copy_workers.jobs = &job;
    for (unsigned i = 0; i < helpers; i++) {
        pthread_cond_signal(&copy_workers.more);
    }
    pthread_mutex_unlock(&copy_workers.lock);
    run(work);
    pthread_mutex_lock(&copy_workers.lock);
    copy_job **link = &copy_workers.jobs;
    while (*link != &job) {
        link = &(*link)->next;
    }
    *link = job.next;
    while (job.inside != 0) {
        pthread_cond_wait(&copy_workers.left, &copy_workers.lock);
    }
    pthread_mutex_unlock(&copy_workers.lock);
}

/* A forked child has none of the threads; whatever the lock was, it is free there. */
static inline void copy_workers_forget(void) {
    pthread_mutex_init(&copy_workers.lock, NULL);
    pthread_cond_init(&copy_workers.more, NULL);
    pthread_cond_init(&copy_workers.left, NULL);
    copy_workers.jobs = NULL;
    copy_workers.running = copy_workers.users = 0;
    copy_workers.stopping = 0;
}

#endif
