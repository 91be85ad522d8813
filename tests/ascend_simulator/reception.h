/* Every socket of the communication half, read by one thread of the process.
 *
 * One mutex guards the sockets and the state of all communicators; bytes of transfers are copied without it. All
 * functions here but `reception_lock` are called with the mutex held, and so are the callbacks. Nothing blocks: what a
 * socket does not take at once waits in a queue of its own. */
#ifndef RECEPTION_H
#define RECEPTION_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_BODY_MAX (1u << 20)

struct frame {
    uint32_t magic; /* set by the sender */
    uint32_t kind;
    uint32_t body; /* bytes that follow */
    uint32_t flags;
    uint64_t number;
    uint64_t value[4];
};

struct socket;

/* `fd` came with the frame, or is -1; who keeps it sets it to -1, else it is closed. */
typedef void frame_callback(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd);
/* The other end is gone, or spoke nonsense. The socket is closed when this returns. */
typedef void end_callback(struct socket *socket, void *owner);
typedef void accept_callback(struct socket *listener, void *owner, struct socket *accepted);

void reception_lock(void);
void reception_unlock(void);
/* Lets the mutex go and waits for `condition` until `deadline` (sim_now); false when it has passed. */
bool reception_wait(pthread_cond_t *condition, uint64_t deadline);

/* The thread lives while somebody holds it. `reception_release` lets the mutex go while it waits for its end. */
bool reception_hold(void);
void reception_release(void);

/* An address is "unix:<name>", an abstract socket of this world, or "tcp:<port>:<ip>". NULL with errno. */
struct socket *socket_listen(const char *address, accept_callback *accepted, void *owner);
struct socket *socket_adopt(int fd, frame_callback *frames, end_callback *ended, void *owner);
/* Who gets what comes from now on; frames that are there already follow at once. */
void socket_serve(struct socket *socket, frame_callback *frames, end_callback *ended, void *owner);
void *socket_owner(const struct socket *socket);
void socket_send(struct socket *socket, struct frame frame, const void *body, int fd);
/* Handles all frames that have arrived; the socket may be gone when it returns. */
void socket_drain(struct socket *socket);
/* Closes without a callback, and drops what the socket has not taken yet. */
void socket_close(struct socket *socket);
/* The same, after all that was sent has left; the socket is no longer the caller's. */
void socket_finish(struct socket *socket);
/* Cuts the connection as a broken wire does: both ends see its end by themselves. */
void socket_cut(struct socket *socket);
bool socket_is_local(const struct socket *socket);
unsigned socket_port(const struct socket *listener); /* of "tcp:0:...", the one that the kernel chose */

/* Without the mutex: a socket connected to the address, or -1 with errno. Never waits longer than `patience_ms`. */
int socket_dial(const char *address, int patience_ms);

#endif
