/* steady.c - connections that stay open and keep moving bytes, every one of which is checked on both sides.
 *
 *   steady serve PORT                               the far end, until killed
 *   steady drive MODE SIZE PAUSE_US COUNT ADDRESS:PORT...   COUNT connections to each; [ADDRESS]:PORT for IPv6
 *
 * MODE: e the server sends back what it got, and the client waits for it before it sends more; s the client sends, the
 * server only reads; d both send. Messages are of 1 to SIZE bytes, PAUSE_US apart. Each connection begins with a few small
 * messages there and back, and all sockets are non-blocking and waited for by level: so they qualify for redirection.
 * What is sent is a stream of random numbers from the connection's key.
 *
 * Commands on standard input, one a line:
 *
 *   report            print one JSON line: connections open, moving (bytes came within the last second), lost; bytes sent,
 *                     got and wrong; "idle": longest time in ms an open connection got nothing
 *   kill PID SIGNAL   signal a process, and report as of that moment
 *   ends              print both ends of the open connections, the own one first
 *   pause, go         (drive) begin no new messages, and again
 *   finish            (drive) end all connections properly, and report when all have ended
 */
#include "net.h"

#include <netdb.h>

#define CONNECTIONS_MAX 4096
#define CHUNK 65536
#define WARM_MESSAGES 16
#define WARM_SIZE 16
#define WARM_BYTES (WARM_MESSAGES * WARM_SIZE)
#define MAGIC 0x7374656164790001ULL
#define LIFETIME_S 240

struct head {
	uint64_t magic, key;
	uint32_t mode, size, pause_us, spare;
};

struct connection {
	int fd, used, watched, sent_end, got_end, blocked;
	uint32_t head_bytes, left; /* of the head that are through, of the message at hand that are not */
	uint64_t sent, got, random, due, last_got, send_key, get_key;
	struct head head;
};

static struct connection connections[CONNECTIONS_MAX];
static int epoll_, client_, finishing, pausing, highest;
static unsigned long opened, lost, ended, wrong, no_memory;
static unsigned long long sent_all, got_all;

static uint64_t word_at(uint64_t key, uint64_t at)
{
	return mix(key + at / 8);
}

static void fill(uint8_t *out, uint64_t key, uint64_t at, size_t count)
{
	for (size_t i = 0; i < count; i++)
		out[i] = (uint8_t)(word_at(key, at + i) >> ((at + i) % 8 * 8));
}

static size_t differing(const uint8_t *data, uint64_t key, uint64_t at, size_t count)
{
	size_t found = 0;

	for (size_t i = 0; i < count; i++)
		found += data[i] != (uint8_t)(word_at(key, at + i) >> ((at + i) % 8 * 8));
	return found;
}

static uint32_t chance(struct connection *c, uint32_t below)
{
	c->random = mix(c->random);
	return (uint32_t)(c->random >> 16) % below;
}

static void watch(struct connection *c)
{
	struct epoll_event event = { .data.ptr = c };

	event.events = (c->got_end ? 0 : EPOLLIN) | (c->blocked ? EPOLLOUT : 0);
	if ((int)event.events == c->watched)
		return;
	c->watched = event.events;
	if (epoll_ctl(epoll_, EPOLL_CTL_MOD, c->fd, &event))
		die("epoll_ctl");
}

static void release(struct connection *c)
{
	close(c->fd);
	c->used = 0;
	ended++;
}

static void lose(struct connection *c, const char *what, int error)
{
	fprintf(stderr, "lost: %s: %s; sent %llu, got %llu\n", what, error ? strerror(error) : "end",
		(unsigned long long)c->sent, (unsigned long long)c->got);
	lost++;
	release(c);
}

static void keyed(struct connection *c)
{
	c->random = mix(c->head.key ^ (client_ ? 1 : 2));
	c->send_key = mix(c->head.key + (client_ ? 11 : 12));
	c->get_key = mix(c->head.key + (client_ ? 12 : 11));
}

static struct connection *take(int fd)
{
	for (int i = 0; i < CONNECTIONS_MAX; i++) {
		struct connection *c = &connections[i];
		struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
		int on = 1;

		if (c->used)
			continue;
		memset(c, 0, sizeof(*c));
		c->fd = fd;
		c->used = 1;
		c->watched = EPOLLIN;
		c->last_got = now_us();
		if (i >= highest)
			highest = i + 1;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event))
			die("epoll_ctl");
		opened++;
		return c;
	}
	fprintf(stderr, "too many connections\n");
	exit(3);
}

/* How long the next message is to be; 0: none now. */
static uint32_t next_message(struct connection *c, uint64_t now)
{
	int stop = client_ ? finishing || pausing : c->got_end;

	if (client_ && (c->sent < WARM_BYTES || c->head.mode == 'e')) {
		if (stop || c->sent != c->got || c->due > now)
			return 0;
		return c->sent < WARM_BYTES ? WARM_SIZE : 1 + chance(c, c->head.size);
	}
	if (!client_ && c->sent < WARM_BYTES)
		return c->got < WARM_BYTES ? c->got - c->sent : WARM_BYTES - c->sent;
	if (!client_ && c->head.mode == 'e')
		return c->got - c->sent;
	if (stop || c->due > now || (!client_ && c->head.mode == 's'))
		return 0;
	return 1 + chance(c, c->head.size);
}

/* Whether everything that is to be sent on this connection was. */
static int all_said(const struct connection *c)
{
	if (c->left)
		return 0;
	if (client_)
		return finishing && (c->head.mode == 's' || c->head.mode == 'd' || c->sent == c->got);
	return c->got_end && (c->head.mode != 'e' || c->sent == c->got);
}

/* Whether there is more to send at once. */
static int sender(struct connection *c, uint64_t now)
{
	static uint8_t data[CHUNK];
	ssize_t count;

	if (c->sent_end || c->blocked || c->head_bytes < sizeof(c->head))
		return 0;
	if (!c->left) {
		c->left = next_message(c, now);
		if (c->left && c->sent >= WARM_BYTES)
			c->due = now + c->head.pause_us;
	}
	if (c->left) {
		size_t size = c->left < CHUNK ? c->left : CHUNK;

		fill(data, c->send_key, c->sent, size);
		count = send(c->fd, data, size, MSG_NOSIGNAL);
		if (count < 0 && errno == EAGAIN) {
			c->blocked = 1;
			watch(c);
			return 0;
		}
		if (count < 0 && errno == ENOMEM) {
			no_memory++;
			return 0;
		}
		if (count < 0) {
			lose(c, "send", errno);
			return 0;
		}
		c->sent += count;
		c->left -= count;
		sent_all += count;
		return 1;
	}
	if (!all_said(c))
		return 0;
	c->sent_end = 1;
	if (shutdown(c->fd, SHUT_WR))
		lose(c, "shutdown", errno);
	else if (c->got_end)
		release(c);
	return 0;
}

static void receiver(struct connection *c, uint64_t now)
{
	static uint8_t data[CHUNK];
	ssize_t count;

	if (!client_ && c->head_bytes < sizeof(c->head)) {
		count = recv(c->fd, (char *)&c->head + c->head_bytes, sizeof(c->head) - c->head_bytes, 0);
		if (count <= 0) {
			if (count == 0 || errno != EAGAIN)
				lose(c, "head", count ? errno : 0);
			return;
		}
		c->head_bytes += count;
		if (c->head_bytes < sizeof(c->head))
			return;
		if (c->head.magic != MAGIC) {
			lose(c, "strange head", 0);
			return;
		}
		keyed(c);
		return;
	}
	count = recv(c->fd, data, sizeof(data), 0);
	if (count < 0) {
		if (errno != EAGAIN)
			lose(c, "recv", errno);
		return;
	}
	if (count == 0) {
		if (client_ && !c->sent_end) {
			lose(c, "recv", 0);
			return;
		}
		c->got_end = 1;
		if (c->sent_end)
			release(c);
		else
			watch(c);
		return;
	}
	wrong += differing(data, c->get_key, c->got, count);
	c->got += count;
	got_all += count;
	c->last_got = now;
}

static void report(void)
{
	uint64_t now = now_us(), idle = 0;
	int open = 0, moving = 0;

	for (int i = 0; i < highest; i++) {
		const struct connection *c = &connections[i];
		if (!c->used)
			continue;
		open++;
		moving += now - c->last_got < 1000000;
		if (now - c->last_got > idle)
			idle = now - c->last_got;
	}
	printf("{\"open\": %d, \"moving\": %d, \"opened\": %lu, \"ended\": %lu, \"lost\": %lu, \"sent\": %llu, "
	       "\"got\": %llu, \"wrong\": %lu, \"enomem\": %lu, \"idle\": %.1f, \"at\": %.6f}\n",
	       open, moving, opened, ended, lost, sent_all, got_all, wrong, no_memory, idle / 1e3, now / 1e6);
}

/* "address:port", with brackets around an IPv6 address. */
static const char *named(const struct sockaddr_storage *address, socklen_t length, char *out, size_t room)
{
	char host[INET6_ADDRSTRLEN], port[8];

	if (getnameinfo((const struct sockaddr *)address, length, host, sizeof(host), port, sizeof(port),
			NI_NUMERICHOST | NI_NUMERICSERV))
		return "?";
	snprintf(out, room, address->ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
	return out;
}

static void ends(void)
{
	const char *before = "{\"ends\": [";

	for (int i = 0; i < highest; i++) {
		struct sockaddr_storage own, theirs;
		socklen_t own_length = sizeof(own), their_length = sizeof(theirs);
		char from[64], to[64];

		if (!connections[i].used || getsockname(connections[i].fd, (struct sockaddr *)&own, &own_length) ||
		    getpeername(connections[i].fd, (struct sockaddr *)&theirs, &their_length))
			continue;
		printf("%s[\"%s\", \"%s\"]", before, named(&own, own_length, from, sizeof(from)),
		       named(&theirs, their_length, to, sizeof(to)));
		before = ", ";
	}
	printf("%s]}\n", *before == '{' ? before : "");
}

static void obey(const char *line)
{
	int pid, number;

	if (sscanf(line, "kill %d %d", &pid, &number) == 2) {
		if (kill(pid, number))
			die("kill");
		report();
	} else if (!strcmp(line, "report")) {
		report();
	} else if (!strcmp(line, "ends")) {
		ends();
	} else if (client_ && (!strcmp(line, "pause") || !strcmp(line, "go"))) {
		pausing = *line == 'p';
		report();
	} else if (!strcmp(line, "finish") && client_) {
		finishing = 1;
		pausing = 0;
	} else {
		fprintf(stderr, "no command: %s\n", line);
		exit(3);
	}
}

static void begin(const struct head *head, const struct sockaddr_storage *target, socklen_t length, uint64_t key)
{
	int fd = socket(target->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct connection *c;

	if (fd < 0 || connect(fd, (const struct sockaddr *)target, length))
		die("connect");
	if (fcntl(fd, F_SETFL, O_NONBLOCK))
		die("fcntl");
	c = take(fd);
	c->head = *head;
	c->head.key = key;
	keyed(c);
	if (send(fd, &c->head, sizeof(c->head), MSG_NOSIGNAL) != sizeof(c->head))
		die("head");
	c->head_bytes = sizeof(c->head);
}

static int run(int listener)
{
	struct epoll_event events[256], event = { .events = EPOLLIN };
	int busy = 0, told = 0;

	fcntl(0, F_SETFL, O_NONBLOCK);
	event.data.ptr = NULL; /* standard input */
	if (epoll_ctl(epoll_, EPOLL_CTL_ADD, 0, &event))
		die("standard input");
	if (listener >= 0) {
		event.data.ptr = &epoll_; /* the listener */
		if (epoll_ctl(epoll_, EPOLL_CTL_ADD, listener, &event))
			die("epoll_ctl");
	}
	printf("%s\n", client_ ? "connected" : "listening");
	for (;;) {
		int count = epoll_wait(epoll_, events, 256, busy ? 0 : 1), open = 0;
		uint64_t now = now_us();

		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;
			if (!c) {
				if (!commands(obey))
					return 0;
			} else if ((void *)c == (void *)&epoll_) {
				int fd;
				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
					take(fd);
			} else if (c->used) {
				if (events[i].events & EPOLLOUT)
					c->blocked = 0;
				if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP) && !c->got_end)
					receiver(c, now);
				if (c->used)
					watch(c);
			}
		}
		busy = 0;
		for (int i = 0; i < highest; i++) {
			if (connections[i].used)
				busy |= sender(&connections[i], now);
			open += connections[i].used;
		}
		if (finishing && !open && !told) {
			told = 1;
			report();
		}
	}
}

int main(int count, char **words)
{
	begin_process(LIFETIME_S);
	epoll_ = epoll_create1(EPOLL_CLOEXEC);
	if (count == 3 && !strcmp(words[1], "serve"))
		return run(listen_on(atoi(words[2])));
	if (count >= 7 && !strcmp(words[1], "drive")) {
		struct head head = { .magic = MAGIC, .mode = words[2][0], .size = atoi(words[3]), .pause_us = atoi(words[4]) };
		uint64_t key = mix(getpid());

		client_ = 1;
		for (int i = 6; i < count; i++) {
			struct sockaddr_storage target;
			char *host = words[i], *port = strrchr(host, ':');
			socklen_t length;

			if (!port)
				die("ADDRESS:PORT");
			*port++ = 0;
			if (*host == '[') {
				host++;
				host[strlen(host) - 1] = 0;
			}
			length = parse_address(host, atoi(port), &target);
			for (int number = 0; number < atoi(words[5]); number++)
				begin(&head, &target, length, key = mix(key));
		}
		return run(-1);
	}
	fprintf(stderr, "usage: steady serve PORT | steady drive MODE SIZE PAUSE_US COUNT ADDRESS:PORT...\n");
	return 2;
}
