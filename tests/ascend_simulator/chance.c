/* Random numbers: one sequence for LLMDD_SIM_SEED, so that a run can be repeated, and letters that no other process
   draws. */
#include "simulator.h"

#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t state;
static uint64_t nonce_state;

static uint64_t mixed(uint64_t *from)
{
    uint64_t number = (*from += 0x9e3779b97f4a7c15u);
    number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9u;
    number = (number ^ (number >> 27)) * 0x94d049bb133111ebu;
    return number ^ (number >> 31);
}

/* Called by aclInit, when the seed is known. */
void sim_chance_start(void)
{
    pthread_mutex_lock(&lock);
    state = (uint64_t)sim_knob(SIM_SEED);
    /* Two processes with one seed must not draw one key; the clock keeps apart those that come after each other with
       one id. */
    uint64_t number = (uint64_t)sim_knob(SIM_SEED) ^ ((uint64_t)getpid() << 32);
    nonce_state = mixed(&number) ^ sim_now();
    pthread_mutex_unlock(&lock);
}

uint64_t sim_random(void)
{
    pthread_mutex_lock(&lock);
    uint64_t number = mixed(&state);
    pthread_mutex_unlock(&lock);
    return number;
}

uint64_t sim_random_below(uint64_t end)
{
    return end ? sim_random() % end : 0;
}

void sim_nonce(char *letters, size_t count)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        letters[i] = (char)('a' + mixed(&nonce_state) % 26);
    pthread_mutex_unlock(&lock);
}
