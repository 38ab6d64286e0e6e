/* load.c - the load generator of `ambient bench`, where no established one fits.
 *
 *   load serve PORT                           echo, sink, one-byte answers and HTTP, in one thread
 *   load rtt HOST PORT BYTES SECONDS          one connection, one message in flight: p50, p99
 *   load stream HOST PORT BYTES SECONDS       one connection, writes of BYTES, until the server has read them all
 *   load connect HOST PORT COUNT SECONDS      COUNT connections being made at any time; the server closes each
 *   load hold HOST PORT COUNT SECONDS         COUNT connections, each echoes a byte; SECONDS is not used
 *
 * A client prints one line of JSON and keeps its connections open until its standard input ends. Every socket is
 * non-blocking from its first moment, as those of servers with an event loop are. Linux; build: cc -O2 load.c load_server.c.
 *
 * load.h has what a connection says first, load_server.c the server.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

#define STALL_S 20 /* without any progress for so long a client gives up */

void fail(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Latencies in steps of 20 ns up to 40 ms; slower ones count in the last. */
#define STEPS 2000000
struct histogram {
	uint32_t *step;
	uint64_t count;
};

static struct histogram histogram(void)
{
	struct histogram h = {calloc(STEPS, sizeof(uint32_t)), 0};

	if (!h.step)
		fail("memory");
	return h;
}

static void note(struct histogram *h, double seconds)
{
	double index = seconds * 5e7;

	h->step[index >= STEPS ? STEPS - 1 : (uint32_t)index]++;
	h->count++;
}

static double quantile_us(const struct histogram *h, double share)
{
	uint64_t wanted = (uint64_t)(share * (h->count ? h->count - 1 : 0)) + 1, seen = 0;

	for (uint32_t index = 0; index < STEPS; index++)
		if ((seen += h->step[index]) >= wanted)
			return index / 50.0;
	return 0;
}

static struct addrinfo *target;
static uint64_t enomem;

static void resolve(const char *host, const char *port)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
	int code = getaddrinfo(host, port, &hints, &target);

	if (code) {
		fprintf(stderr, "load: %s: %s\n", host, gai_strerror(code));
		exit(1);
	}
}

/* Streams leave it to TCP to join what is written, as they do by default. */
static int begin(int nodelay)
{
	int fd = socket(target->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		fail("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &nodelay, sizeof(nodelay));
	if (connect(fd, target->ai_addr, target->ai_addrlen) && errno != EINPROGRESS)
		fail("connect");
	return fd;
}

static int input = -1; /* epoll, by level: a client waits for what comes as an event loop does */

static void await_output(int fd)
{
	struct pollfd p = {fd, POLLOUT, 0};
	int n = poll(&p, 1, STALL_S * 1000);

	if (n == 0)
		errno = ETIMEDOUT;
	if (n <= 0)
		fail("waiting");
}

static void await_input(void)
{
	struct epoll_event event;
	int n = epoll_wait(input, &event, 1, STALL_S * 1000);

	if (n == 0)
		errno = ETIMEDOUT;
	if (n <= 0)
		fail("waiting");
}

static void put(int fd, const void *data, size_t size)
{
	while (size) {
		ssize_t n = send(fd, data, size, MSG_NOSIGNAL);

		if (n < 0) {
			if (errno == ENOMEM)
				enomem++;
			else if (errno != EAGAIN)
				fail("send");
			await_output(fd);
			continue;
		}
		data = (const char *)data + n;
		size -= n;
	}
}

static void get(int fd, void *data, size_t size)
{
	while (size) {
		ssize_t n = recv(fd, data, size, 0);

		if (n == 0) {
			errno = ECONNRESET;
			fail("early end");
		}
		if (n < 0) {
			if (errno != EAGAIN)
				fail("recv");
			await_input();
			continue;
		}
		data = (char *)data + n;
		size -= n;
	}
}

static int opened(char what, uint32_t size)
{
	struct header header = {.what = what, .size = size};
	int fd = begin(what != 'S');
	struct epoll_event event = {.events = EPOLLIN};

	await_output(fd);
	if (input < 0)
		input = epoll_create1(EPOLL_CLOEXEC);
	if (input < 0 || epoll_ctl(input, EPOLL_CTL_ADD, fd, &event))
		fail("epoll");
	put(fd, &header, sizeof(header));
	return fd;
}

static double cpu_s(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void linger(void)
{
	char byte;

	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
}

static void rtt(uint32_t size, double seconds)
{
	struct histogram h = histogram();
	char *data = calloc(1, size);
	int fd = opened('E', size);
	double start, last;

	for (int warm = 0; warm < 20; warm++) {
		put(fd, data, size);
		get(fd, data, size);
	}
	start = last = now();
	while (last - start < seconds) {
		double before = last;

		put(fd, data, size);
		get(fd, data, size);
		last = now();
		note(&h, last - before);
	}
	printf("{\"count\": %llu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"seconds\": %.3f, \"cpu_s\": %.3f, \"bytes\": %llu, "
	       "\"enomem\": %llu}\n",
	       (unsigned long long)h.count, quantile_us(&h, 0.5), quantile_us(&h, 0.99), last - start, cpu_s(),
	       (unsigned long long)(h.count + 20) * size, (unsigned long long)enomem);
	linger();
}

static void stream(uint32_t size, double seconds)
{
	char *data = calloc(1, size), one = 1;
	int fd = opened('S', size);
	uint64_t sent = 0, read_there;
	double start, took;

	for (int warm = 0; warm < WARM; warm++) {
		put(fd, data, 1);
		get(fd, data, 1);
	}
	start = now();

	while (now() - start < seconds) {
		put(fd, data, size);
		sent += size;
	}
	put(fd, &one, 1);
	sent++;
	get(fd, &read_there, sizeof(read_there));
	took = now() - start;
	if (read_there != sent) {
		fprintf(stderr, "load: %llu bytes sent, %llu read\n", (unsigned long long)sent, (unsigned long long)read_there);
		exit(1);
	}
	printf("{\"bytes\": %llu, \"gbit_s\": %.4f, \"seconds\": %.3f, \"cpu_s\": %.3f, \"enomem\": %llu}\n",
	       (unsigned long long)sent, sent * 8 / took / 1e9, took, cpu_s(), (unsigned long long)enomem);
	linger();
}

struct dial {
	int fd, connected;
	double began;
};

static void dial(struct dial *it, int poller, uint64_t index)
{
	struct epoll_event event = {.events = EPOLLOUT, .data.u64 = index};

	it->began = now();
	it->connected = 0;
	it->fd = begin(1);
	epoll_ctl(poller, EPOLL_CTL_ADD, it->fd, &event);
}

static void connects(int count, double seconds)
{
	struct histogram whole = histogram(), handshake = histogram();
	struct dial *all = calloc(count, sizeof(*all));
	struct header header = {.what = 'C', .size = 1};
	struct epoll_event ready[64];
	int poller = epoll_create1(EPOLL_CLOEXEC), left = count;
	uint64_t errors = 0;
	double start = now(), last = start;

	for (int index = 0; index < count; index++)
		dial(&all[index], poller, index);
	while (left) {
		int n = epoll_wait(poller, ready, 64, STALL_S * 1000);

		if (n <= 0) {
			errno = ETIMEDOUT;
			fail("connections");
		}
		for (int at = 0; at < n; at++) {
			uint64_t index = ready[at].data.u64;
			struct dial *it = &all[index];
			struct epoll_event event = {.events = EPOLLIN, .data.u64 = index};
			char byte[2];
			ssize_t got;

			if (!it->connected && !(ready[at].events & EPOLLERR)) {
				it->connected = 1;
				note(&handshake, now() - it->began);
				put(it->fd, &header, sizeof(header));
				epoll_ctl(poller, EPOLL_CTL_MOD, it->fd, &event);
				continue;
			}
			got = recv(it->fd, byte, sizeof(byte), 0);
			if (got < 0 && errno == EAGAIN)
				continue;
			if (got == 1 && it->connected == 1) {
				it->connected = 2; /* the byte is here; now the server's end */
				note(&whole, now() - it->began);
				continue;
			}
			errors += got != 0 || it->connected != 2;
			close(it->fd);
			last = now();
			if (last - start < seconds)
				dial(it, poller, index);
			else
				left--;
		}
	}
	printf("{\"count\": %llu, \"per_s\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"connect_p50_us\": %.2f, "
	       "\"errors\": %llu, \"seconds\": %.3f, \"cpu_s\": %.3f}\n",
	       (unsigned long long)whole.count, whole.count / (last - start), quantile_us(&whole, 0.5),
	       quantile_us(&whole, 0.99), quantile_us(&handshake, 0.5), (unsigned long long)errors, last - start, cpu_s());
	linger();
}

static void hold(int count)
{
	int *fds = calloc(count, sizeof(*fds));
	char byte = 'x';

	for (int index = 0; index < count; index++)
		fds[index] = opened('E', 1);
	for (int index = 0; index < count; index++)
		put(fds[index], &byte, 1);
	for (int index = 0; index < count; index++)
		get(fds[index], &byte, 1);
	printf("{\"held\": %d}\n", count);
	linger();
}

int main(int argc, char **argv)
{
	struct rlimit files = {CONNECTIONS_MAX, CONNECTIONS_MAX};
	long number;
	double seconds;

	setrlimit(RLIMIT_NOFILE, &files);
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc != 6) {
		fprintf(stderr, "usage: load serve PORT | load rtt|stream|connect|hold HOST PORT NUMBER SECONDS\n");
		return 2;
	}
	resolve(argv[2], argv[3]);
	number = atol(argv[4]);
	seconds = atof(argv[5]);
	if (number < 1 || number > MESSAGE_MAX) {
		fprintf(stderr, "load: NUMBER: 1 to %d\n", MESSAGE_MAX);
		return 2;
	}
	if (!strcmp(argv[1], "rtt"))
		rtt(number, seconds);
	else if (!strcmp(argv[1], "stream"))
		stream(number, seconds);
	else if (!strcmp(argv[1], "connect"))
		connects(number, seconds);
	else if (!strcmp(argv[1], "hold"))
		hold(number);
	else
		return 2;
	return 0;
}
