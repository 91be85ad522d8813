/* Sockets between processes of one server: names that leave nothing behind, and descriptors passed along. */
#include "simulator.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MOST_FILES 4

socklen_t sim_socket_name(struct sockaddr_un *name, const char *format, ...)
{
    char world[64];
    sim_knob_text(SIM_WORLD, world, sizeof world);
    memset(name, 0, sizeof *name);
    name->sun_family = AF_UNIX;
    char *text = name->sun_path + 1; /* a first NUL makes the name abstract */
    size_t room = sizeof name->sun_path - 1;
    int length = snprintf(text, room, "llmdd-sim/%u/%s/", (unsigned)getuid(), world);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(text + length, room - (size_t)length, format, arguments);
    va_end(arguments);
    if ((size_t)length > room)
        length = (int)room;
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

int sim_send_files(int socket, const void *bytes, size_t size, const int *files, size_t count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(MOST_FILES * sizeof(int))];
    } control;
    memset(&control, 0, sizeof control);
    struct iovec part = {(void *)(uintptr_t)bytes, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control.room;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), files, count * sizeof(int));
    }
    while (size) {
        ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return errno;
        part.iov_base = (char *)part.iov_base + sent;
        part.iov_len = size -= (size_t)sent;
        message.msg_control = NULL; /* the descriptors went with the first byte */
        message.msg_controllen = 0;
    }
    return 0;
}

/* Descriptors of one message into files[*got ...]; what has no room there is closed. */
static void keep_files(struct msghdr *message, int *files, size_t count, size_t *got)
{
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header; header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t here = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < here; i++) {
            int file;
            memcpy(&file, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
            if (*got < count)
                files[(*got)++] = file;
            else
                close(file);
        }
    }
}

int sim_receive_files(int socket, void *bytes, size_t size, int *files, size_t count)
{
    size_t got = 0;
    int error = 0;
    while (size && !error) {
        union {
            struct cmsghdr align;
            char room[CMSG_SPACE(MOST_FILES * sizeof(int))];
        } control;
        struct iovec part = {bytes, size};
        struct msghdr message = {.msg_iov = &part,
                                 .msg_iovlen = 1,
                                 .msg_control = control.room,
                                 .msg_controllen = sizeof control};
        ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
        if (received < 0 && errno == EINTR)
            continue;
        if (received <= 0) {
            error = received ? errno : ECONNRESET;
            break;
        }
        keep_files(&message, files, count, &got);
        bytes = (char *)bytes + received;
        size -= (size_t)received;
    }
    if (!error && got < count)
        error = EPROTO;
    if (error)
        while (got)
            close(files[--got]);
    return error;
}
