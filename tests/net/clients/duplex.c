/* duplex.c - many connections, full duplex, every byte checked.
 *
 *   duplex serve|dial IP PORT FLOWS MODE BYTES SIZE PAUSE_US END ACCEPT_DELAY_MS SEED
 *
 * MODE: n non-blocking, level-triggered; e non-blocking, edge-triggered, and a short read counts as drained (unless the end was announced); b blocking, a
 * thread for each direction; t non-blocking until half of the bytes were read, then blocking; s the other way round; w from
 * one to the other at each quarter.
 * BYTES are sent by each end in messages of 1 to SIZE bytes; before a read or write it now and then pauses up to
 * PAUSE_US. END: f half-close and read to the end; r reset once half was sent; u close at once when half was read, the rest
 * unread; k keep open, print, and end with stdin. The first eight bytes of a connection are its number and are sent by the client. Prints one line of
 * JSON; exits 0 if every byte received was right and, for END f, all came. Dies after 120 s.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
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

#define PERIOD 65521
#define BUFFER 262144

static uint8_t table[PERIOD];
static int flows, serving, accept_delay_ms;
static char mode, ending;
static uint64_t total, size, pause_us, seed;
static long wrong, again_blocking, no_memory, resets, done;
static uint64_t sent_all, received_all;

struct flow {
	int fd, wake_read, finished_read, finished_write, blocking, readable, writable, ended;
	uint64_t id, sent, received, random, head;
	uint8_t head_bytes[8];
};

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint8_t byte_at(uint64_t id, int from_server, uint64_t offset)
{
	return table[(offset + id * 7919 + from_server * 104729) % PERIOD] ^ (uint8_t)(offset / PERIOD);
}

static void rest(struct flow *f)
{
	if (pause_us && next(&f->random) % 16 == 0)
		usleep(next(&f->random) % pause_us);
}

static void check(struct flow *f, const uint8_t *data, size_t length)
{
	size_t index = 0;

	while (serving && f->head < 8 && index < length)
		f->head_bytes[f->head++] = data[index++];
	if (serving && f->head == 8 && index)
		memcpy(&f->id, f->head_bytes, 8);
	for (; index < length; index++) {
		if (data[index] != byte_at(f->id, !serving, f->received)) {
			if (__sync_fetch_and_add(&wrong, 1) < 5)
				fprintf(stderr, "%s: flow %lu: byte %lu is wrong\n", serving ? "server" : "client", f->id, f->received);
		}
		f->received++;
	}
}

/* Whether the descriptor blocks at this point of the exchange. */
static int blocks(struct flow *f)
{
	if (mode == 't')
		return f->received > total / 2;
	if (mode == 's')
		return f->received <= total / 2;
	if (mode == 'w')
		return f->received / (total / 4 + 1) % 2;
	return mode == 'b';
}

static void set_blocking(struct flow *f, int wanted)
{
	int flags = fcntl(f->fd, F_GETFL);

	if (wanted != f->blocking)
		fcntl(f->fd, F_SETFL, wanted ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
	f->blocking = wanted;
}

/* 1: more to do now, 0: nothing more at all, -1: would block. */
static int read_some(struct flow *f, uint8_t *buffer)
{
	size_t want = 1 + next(&f->random) % BUFFER;
	ssize_t got;

	rest(f);
	got = recv(f->fd, buffer, want, 0);
	if (got > 0) {
		check(f, buffer, got);
		set_blocking(f, blocks(f));
		if (mode == 'e' && (size_t)got < want && !f->ended)
			return -1;
		return 1;
	}
	if (got == 0)
		return 0;
	if (errno == EAGAIN) {
		if (!f->blocking)
			return -1;
		__sync_fetch_and_add(&again_blocking, 1);
		return 1;
	}
	__sync_fetch_and_add(&resets, 1);
	return 0;
}

static int write_some(struct flow *f, uint8_t *buffer)
{
	uint64_t length = 1 + next(&f->random) % size;
	ssize_t put;

	if (f->sent == total || (ending == 'r' && f->sent > total / 2))
		return 0;
	if (serving && f->head < 8)
		return -1; /* does not know yet which connection it is */
	if (length > total - f->sent)
		length = total - f->sent;
	if (length > BUFFER)
		length = BUFFER;
	for (uint64_t index = 0; index < length; index++)
		buffer[index] = byte_at(f->id, serving, f->sent + index);
	rest(f);
	put = send(f->fd, buffer, length, MSG_NOSIGNAL | (mode == 'b' ? 0 : MSG_DONTWAIT));
	if (put > 0) {
		f->sent += put;
		return 1;
	}
	if (errno == EAGAIN)
		return f->blocking && mode == 'b' ? 1 : -1;
	if (errno == ENOMEM) {
		__sync_fetch_and_add(&no_memory, 1);
		usleep(1000);
		return 1;
	}
	__sync_fetch_and_add(&resets, 1);
	f->finished_read = 1;
	return 0;
}

static void end_writing(struct flow *f)
{
	struct linger now = {.l_onoff = 1};

	f->finished_write = 1;
	if (ending == 'f')
		shutdown(f->fd, SHUT_WR);
	if (ending == 'r') {
		setsockopt(f->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		f->finished_read = 1;
	}
}

static int want_no_more(struct flow *f)
{
	return (ending == 'u' && f->received > total / 2) || (ending == 'k' && f->received == total);
}

static void finish(struct flow *f)
{
	__sync_fetch_and_add(&sent_all, f->sent);
	__sync_fetch_and_add(&received_all, f->received);
	if (ending == 'f' && f->received != total) {
		fprintf(stderr, "%s: flow %lu: %lu bytes instead of %lu\n", serving ? "server" : "client", f->id, f->received, total);
		__sync_fetch_and_add(&wrong, 1);
	}
	if (ending != 'k')
		close(f->fd);
	__sync_fetch_and_add(&done, 1);
}

static void *reader(void *argument)
{
	struct flow *f = argument;
	uint8_t *buffer = malloc(BUFFER);

	while (!want_no_more(f) && read_some(f, buffer) > 0)
		;
	free(buffer);
	return 0;
}

static void *writer(void *argument)
{
	struct flow *f = argument;
	uint8_t *buffer = malloc(BUFFER);
	pthread_t other;
	int result;

	f->random ^= 0x9e3779b97f4a7c15ull;
	pthread_create(&other, 0, reader, f);
	while ((result = write_some(f, buffer)))
		if (result < 0)
			usleep(200);
	end_writing(f);
	if (ending == 'r')
		shutdown(f->fd, SHUT_RD);
	pthread_join(other, 0);
	finish(f);
	free(buffer);
	return 0;
}

static void start(struct flow *f, int fd, uint64_t id, int poll)
{
	int one = 1;
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | (mode == 'e' ? EPOLLET | EPOLLRDHUP : 0), .data.ptr = f};

	memset(f, 0, sizeof(*f));
	f->fd = fd;
	f->id = id;
	f->random = seed * 2654435761u + id * 40503 + serving + 1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (!serving && send(fd, &id, 8, MSG_NOSIGNAL) != 8)
		__sync_fetch_and_add(&resets, 1);
	if (mode == 'b') {
		pthread_t thread;
		pthread_attr_t attributes;

		f->blocking = 1;
		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 65536);
		if (pthread_create(&thread, &attributes, writer, f))
			exit(4);
		pthread_detach(thread);
		return;
	}
	f->blocking = 1; /* as it is made */
	set_blocking(f, blocks(f));
	epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

/* One turn of one connection. */
static void step(struct flow *f, uint8_t *buffer)
{
	int result, turns = 0;

	while (f->readable && !f->finished_read && turns++ < 8) {
		result = read_some(f, buffer);
		if (result == 0 || want_no_more(f))
			f->finished_read = 1;
		if (result < 0)
			f->readable = 0;
		if (f->blocking)
			break;
	}
	if (ending == 'u' && f->finished_read && !f->finished_write)
		end_writing(f);
	for (turns = 0; f->writable && !f->finished_write && turns < 8; turns++) {
		result = write_some(f, buffer);
		if (result == 0)
			end_writing(f);
		if (result < 0)
			f->writable = serving && f->head < 8;
		if (result < 0 || f->blocking)
			break;
	}
	if (f->finished_read && f->finished_write && f->fd >= 0) {
		finish(f);
		f->fd = -1;
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_storage where = {};
	struct sockaddr_in *in4 = (void *)&where;
	struct sockaddr_in6 *in6 = (void *)&where;
	socklen_t length = sizeof(*in4);
	struct timespec begin, now;
	struct rlimit files = {65536, 65536};
	uint8_t *buffer = malloc(BUFFER);
	struct flow *all;
	uint64_t state;
	int poll = epoll_create1(0), listener = -1, one = 1;

	if (argc != 12)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(120);
	setrlimit(RLIMIT_NOFILE, &files);
	serving = !strcmp(argv[1], "serve");
	flows = atoi(argv[4]);
	mode = argv[5][0];
	total = strtoull(argv[6], 0, 10);
	size = strtoull(argv[7], 0, 10);
	pause_us = strtoull(argv[8], 0, 10);
	ending = argv[9][0];
	accept_delay_ms = atoi(argv[10]);
	seed = strtoull(argv[11], 0, 10);
	state = 88172645463325252ull;
	for (int index = 0; index < PERIOD; index++)
		table[index] = next(&state) >> 11;
	if (strchr(argv[2], ':')) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons(atoi(argv[3]));
		inet_pton(AF_INET6, argv[2], &in6->sin6_addr);
		length = sizeof(*in6);
	} else {
		in4->sin_family = AF_INET;
		in4->sin_port = htons(atoi(argv[3]));
		inet_pton(AF_INET, argv[2], &in4->sin_addr);
	}
	all = calloc(flows, sizeof(*all));
	if (serving) {
		listener = socket(where.ss_family, SOCK_STREAM, 0);
		setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(listener, (void *)&where, length) || listen(listener, 4096))
			return 3;
		printf("listening\n");
		fflush(stdout);
	}
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (int index = 0; index < flows; index++) {
		int fd;

		if (serving) {
			if (accept_delay_ms)
				usleep(accept_delay_ms * 1000);
			fd = accept(listener, 0, 0);
		} else {
			fd = socket(where.ss_family, SOCK_STREAM, 0);
			if (connect(fd, (void *)&where, length)) {
				perror("connect");
				return 3;
			}
		}
		start(&all[index], fd, index, poll);
	}
	while (done < flows) {
		struct epoll_event events[64];
		int busy = 0, count;

		if (mode == 'b') {
			usleep(1000);
			continue;
		}
		for (int index = 0; index < flows && mode == 'e'; index++)
			busy |= all[index].fd >= 0 && ((all[index].readable && !all[index].finished_read) ||
						       (all[index].writable && !all[index].finished_write && all[index].head + !serving * 8 >= 8));
		count = epoll_wait(poll, events, 64, busy ? 0 : 1000);
		for (int index = 0; index < count; index++) {
			struct flow *f = events[index].data.ptr;

			if (events[index].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
				f->readable = 1;
			if (events[index].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
				f->ended = 1;
			if (events[index].events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
				f->writable = 1;
			if (mode == 'e')
				continue;
			step(f, buffer);
			f->readable = f->writable = 0;
			if (f->finished_write && f->fd >= 0) {
				struct epoll_event less = {.events = f->finished_read ? 0 : EPOLLIN, .data.ptr = f};
				epoll_ctl(poll, EPOLL_CTL_MOD, f->fd, &less);
			} else if (f->finished_read && f->fd >= 0) {
				struct epoll_event less = {.events = EPOLLOUT, .data.ptr = f};
				epoll_ctl(poll, EPOLL_CTL_MOD, f->fd, &less);
			}
		}
		for (int index = 0; index < flows && mode == 'e'; index++)
			if (all[index].fd >= 0)
				step(&all[index], buffer);
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	printf("{\"wrong\": %ld, \"sent\": %lu, \"received\": %lu, \"again_blocking\": %ld, \"enomem\": %ld, \"resets\": %ld, \"seconds\": %.3f}\n",
	       wrong, sent_all, received_all, again_blocking, no_memory, resets,
	       (now.tv_sec - begin.tv_sec) + (now.tv_nsec - begin.tv_nsec) / 1e9);
	fflush(stdout);
	if (ending == 'k')
		getchar();
	return wrong ? 1 : 0;
}
