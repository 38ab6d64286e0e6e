/* load_server.c - the server of load.c: echo, sink, one-byte answers and HTTP, in one thread. See load.h for what a
 * connection says first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "load.h"

#define ANSWER "HTTP/1.1 200 OK\r\nServer: load\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\n0123456789"
#define ANSWERS_MAX 64

struct served {
	struct header header;
	uint32_t have;  /* of the header, then of the message to echo */
	uint32_t owed;  /* still to write */
	uint32_t written;
	uint64_t total;
	int open, headed, waiting; /* for room to write */
	int matched;               /* characters of an empty line */
	uint8_t *buffer;
};

static void end(struct served *all, int fd)
{
	free(all[fd].buffer);
	memset(&all[fd], 0, sizeof(all[fd]));
	close(fd);
}

/* Owe an answer for each request that ends in these bytes; returns 0 if there are too many. */
static int answer(struct served *it, const uint8_t *data, ssize_t length)
{
	static const char empty[] = "\r\n\r\n";

	for (ssize_t index = 0; index < length; index++) {
		it->matched = data[index] == empty[it->matched] ? it->matched + 1 : data[index] == '\r';
		if (it->matched < 4)
			continue;
		it->matched = 0;
		if (it->owed + sizeof(ANSWER) > ANSWERS_MAX * sizeof(ANSWER))
			return 0;
		memcpy(it->buffer + it->owed, ANSWER, sizeof(ANSWER) - 1);
		it->owed += sizeof(ANSWER) - 1;
	}
	return 1;
}

/* Returns 0 when the connection is done. */
static int serve_one(struct served *it, int fd, uint8_t *sink)
{
	ssize_t n;

	for (;;) {
		if (it->owed) {
			n = send(fd, it->buffer + it->written, it->owed, MSG_NOSIGNAL);
			if (n < 0)
				return errno == EAGAIN || errno == ENOMEM;
			it->written += n;
			if ((it->owed -= n))
				continue;
			it->written = it->have = 0;
			if (it->header.what == 'C')
				return 0;
		}
		if (!it->headed) {
			n = recv(fd, (uint8_t *)&it->header + it->have, sizeof(it->header) - it->have, 0);
			if (n <= 0)
				return n < 0 && errno == EAGAIN;
			if ((it->have += n) < sizeof(it->header))
				continue;
			it->headed = 1;
			it->have = 0;
			if (it->header.what == 'G')
				it->header.size = ANSWERS_MAX * sizeof(ANSWER);
			if (it->header.size > MESSAGE_MAX)
				return 0;
			it->buffer = calloc(1, it->header.size + 8);
			if (!it->buffer)
				return 0;
			if (it->header.what == 'C')
				it->owed = 1;
			continue;
		}
		if (it->header.what == 'G') {
			n = recv(fd, sink, 4096, 0);
			if (n <= 0)
				return n < 0 && errno == EAGAIN;
			if (!answer(it, sink, n))
				return 0;
			continue;
		}
		if (it->header.what == 'S') {
			n = recv(fd, sink, it->total < WARM ? 1 : MESSAGE_MAX, 0);
			if (n <= 0)
				return n < 0 && errno == EAGAIN;
			it->total += n;
			if (it->total <= WARM) {
				it->owed = 1;
			} else if (sink[n - 1]) {
				it->total -= WARM;
				memcpy(it->buffer, &it->total, 8);
				it->owed = 8;
			}
			continue;
		}
		n = recv(fd, it->buffer + it->have, it->header.size - it->have, 0);
		if (n <= 0)
			return n < 0 && errno == EAGAIN;
		if ((it->have += n) == it->header.size)
			it->owed = it->header.size;
	}
}

/* Level-triggered: to a socket that is waited for edge-triggered nothing is redirected. */
static void serve_on(struct served *all, int poller, int fd, uint8_t *sink)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	if (!serve_one(&all[fd], fd, sink)) {
		end(all, fd);
		return;
	}
	if (all[fd].waiting == !!all[fd].owed)
		return;
	all[fd].waiting = !!all[fd].owed;
	if (all[fd].waiting)
		event.events = EPOLLOUT;
	epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event);
}

void serve(int port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	struct served *all = calloc(CONNECTIONS_MAX, sizeof(*all));
	uint8_t *sink = malloc(MESSAGE_MAX);
	int zero = 0, one = 1, listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int poller = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[256];

	setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (!all || !sink || bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 8192))
		fail("listen");
	epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(poller, ready, 256, -1);

		for (int index = 0; index < count; index++) {
			int fd = ready[index].data.fd;

			if (fd != listener) {
				if (all[fd].open)
					serve_on(all, poller, fd, sink);
				continue;
			}
			while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
				if (fd >= CONNECTIONS_MAX) {
					close(fd);
					continue;
				}
				setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
				all[fd].open = 1;
				event = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
				epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
				serve_on(all, poller, fd, sink);
			}
		}
	}
}
