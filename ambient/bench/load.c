/* load.c - the load generator of `ambient bench`, where no established one fits.
 *
 *   load serve PORT                           echo, sink, one-byte answers and HTTP, in one thread
 *   load rtt HOST PORT BYTES SECONDS          one connection, one message in flight: p50, p99
 *   load stream HOST PORT BYTES SECONDS       one connection, writes of BYTES, until the server has read them all
 *   load connect HOST PORT COUNT SECONDS      COUNT connections being made at any time; the server closes each
 *   load hold HOST PORT COUNT SECONDS         COUNT connections, each echoes a byte; SECONDS is not used
 *
 * A client prints one line of JSON and keeps its connections open until its standard input ends. Every socket is
 * non-blocking from its first moment, as those of servers with an event loop are. Linux; build: cc -O2 load.c.
 *
 * A connection begins with eight bytes from the client: what ('E', 'S' or 'C'), three zeros, and the size of a message in
 * the machine's byte order. A stream begins with WARM bytes that are echoed one by one, as a protocol that greets does (only
 * sockets whose application has read something are redirected), is zeros from there on, and ends with a one. What begins
 * with a G instead is HTTP: each empty line is answered with ten bytes, as nginx is told to.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE_MAX (1 << 20)
#define CONNECTIONS_MAX 16384
#define WARM 64
#define ANSWER "HTTP/1.1 200 OK\r\nServer: load\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\n0123456789"
#define ANSWERS_MAX 64
#define STALL_S 20 /* without any progress for so long a client gives up */

struct header {
	uint8_t what, pad[3];
	uint32_t size;
};

static void fail(const char *what)
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

/* --- server */

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

static void serve(int port)
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

/* --- clients */

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
