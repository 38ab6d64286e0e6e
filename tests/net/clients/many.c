/* many.c - a great many short connections, few at a time, both ends event-driven.
 *
 *   many serve IP PORT PORTS CONNECTIONS
 *   many dial  IP PORT PORTS CONNECTIONS AT_ONCE ROUNDS
 *
 * The server listens on PORTS ports from PORT on. A connection is ROUNDS times a message of 64 bytes there and back, then
 * an end: in turn closed by the client, closed by the server, or reset by the client. All descriptors are O_NONBLOCK and
 * waited for by level. `dial` prints a line of JSON and exits 0 if every connection went as said; `serve` ends
 * when it has seen CONNECTIONS of them. Dies after 120 s.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE 64
#define DESCRIPTORS 65536

enum { CLIENT_CLOSES, SERVER_CLOSES, CLIENT_RESETS, ENDS };

struct message {
	uint32_t connection, round;
	uint8_t last, pad[MESSAGE - 9];
};

static struct {
	uint32_t connection, round, got;
	uint8_t live, buffer[MESSAGE];
} state[DESCRIPTORS];

static struct sockaddr_storage where;
static socklen_t length;
static int poller, ports, base, rounds;
static long total, failed, begun, over, open_now, most;

static void set_port(int port)
{
	if (where.ss_family == AF_INET6)
		((struct sockaddr_in6 *)&where)->sin6_port = htons(port);
	else
		((struct sockaddr_in *)&where)->sin_port = htons(port);
}

static void await(int operation, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	epoll_ctl(poller, operation, fd, &event);
}

static void end(int fd, int reset)
{
	struct linger now = {.l_onoff = 1};

	if (reset)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	close(fd);
	state[fd].live = 0;
	over++;
	open_now--;
}

static void fail(int fd, const char *what)
{
	if (failed++ < 5)
		fprintf(stderr, "connection %u, round %u: %s: %s\n", state[fd].connection, state[fd].round, what, strerror(errno));
	end(fd, 1);
}

static void ask(int fd)
{
	struct message message = {.connection = state[fd].connection, .round = state[fd].round};

	message.last = state[fd].round + 1 == (uint32_t)rounds;
	if (send(fd, &message, MESSAGE, MSG_NOSIGNAL) != MESSAGE)
		fail(fd, "send");
}

static void dial(void)
{
	int one = 1, fd = socket(where.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);

	set_port(base + begun % ports);
	memset(&state[fd], 0, sizeof(state[fd]));
	state[fd].live = 1;
	state[fd].connection = begun++;
	if (++open_now > most)
		most = open_now;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, (void *)&where, length) && errno != EINPROGRESS) {
		fail(fd, "connect");
		return;
	}
	await(EPOLL_CTL_ADD, fd, EPOLLOUT);
}

/* A whole message arrived: 1; not yet: 0; the connection is over: -1. */
static int receive(int fd)
{
	ssize_t got = recv(fd, state[fd].buffer + state[fd].got, MESSAGE - state[fd].got, 0);

	if (got < 0 && errno == EAGAIN)
		return 0;
	if (got <= 0)
		return -1;
	state[fd].got += got;
	if (state[fd].got < MESSAGE)
		return 0;
	state[fd].got = 0;
	return 1;
}

static void client_turn(int fd, uint32_t events)
{
	struct message *answer = (void *)state[fd].buffer;
	int which = state[fd].connection % ENDS, result;

	if (events & EPOLLOUT) {
		int error = 0;
		socklen_t size = sizeof(error);

		getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
		errno = error;
		if (error) {
			fail(fd, "connect");
			return;
		}
		await(EPOLL_CTL_MOD, fd, EPOLLIN);
		ask(fd);
		return;
	}
	result = receive(fd);
	if (result < 0 && which == SERVER_CLOSES && state[fd].round == (uint32_t)rounds) {
		end(fd, 0);
		return;
	}
	if (result < 0) {
		fail(fd, "receive");
		return;
	}
	if (!result)
		return;
	if (answer->connection != state[fd].connection || answer->round != state[fd].round) {
		fail(fd, "another answer");
		return;
	}
	if (++state[fd].round < (uint32_t)rounds)
		ask(fd);
	else if (which != SERVER_CLOSES)
		end(fd, which == CLIENT_RESETS);
}

static void server_turn(int fd)
{
	struct message *message = (void *)state[fd].buffer;
	int result = receive(fd), last;

	if (!result)
		return;
	if (result < 0) {
		end(fd, 0);
		return;
	}
	last = message->last && message->connection % ENDS == SERVER_CLOSES;
	if (send(fd, message, MESSAGE, MSG_NOSIGNAL) != MESSAGE || last)
		end(fd, 0);
}

static void take(int listener)
{
	int fd, one = 1;

	while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
		memset(&state[fd], 0, sizeof(state[fd]));
		state[fd].live = 1;
		open_now++;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		await(EPOLL_CTL_ADD, fd, EPOLLIN);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in *in4 = (void *)&where;
	struct sockaddr_in6 *in6 = (void *)&where;
	struct rlimit files = {DESCRIPTORS, DESCRIPTORS};
	struct timespec begin, now;
	int serving, at_once = 0, one = 1, first = 0;

	if (argc < 6)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(120);
	setrlimit(RLIMIT_NOFILE, &files);
	serving = !strcmp(argv[1], "serve");
	base = atoi(argv[3]);
	ports = atoi(argv[4]);
	total = atol(argv[5]);
	if (strchr(argv[2], ':')) {
		in6->sin6_family = AF_INET6;
		inet_pton(AF_INET6, argv[2], &in6->sin6_addr);
		length = sizeof(*in6);
	} else {
		in4->sin_family = AF_INET;
		inet_pton(AF_INET, argv[2], &in4->sin_addr);
		length = sizeof(*in4);
	}
	poller = epoll_create1(0);
	if (serving) {
		for (int index = 0; index < ports; index++) {
			int listener = socket(where.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);

			setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
			set_port(base + index);
			if (bind(listener, (void *)&where, length) || listen(listener, 4096))
				return 3;
			await(EPOLL_CTL_ADD, listener, EPOLLIN);
			first = listener;
		}
		printf("listening\n");
		fflush(stdout);
	} else {
		if (argc != 8)
			return 2;
		at_once = atoi(argv[6]);
		rounds = atoi(argv[7]);
	}
	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (over < total) {
		struct epoll_event events[256];
		int count;

		while (!serving && begun < total && open_now < at_once)
			dial();
		count = epoll_wait(poller, events, 256, 1000);
		for (int index = 0; index < count; index++) {
			int fd = events[index].data.fd;

			if (serving && fd <= first)
				take(fd);
			else if (serving && state[fd].live)
				server_turn(fd);
			else if (state[fd].live)
				client_turn(fd, events[index].events);
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	printf("{\"over\": %ld, \"failed\": %ld, \"most\": %ld, \"seconds\": %.3f}\n", over, failed, most,
	       (now.tv_sec - begin.tv_sec) + (now.tv_nsec - begin.tv_nsec) / 1e9);
	return failed ? 1 : 0;
}
