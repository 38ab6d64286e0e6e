/* exact.c - many connections at once, every byte of which is checked on both sides.
 *
 *   exact serve PORT                          the far end; when standard input ends it waits for its connections and prints totals
 *   exact drive ADDRESS PORT COUNT BYTES SEED COUNT connections, all open before any is used; most carry at
 *                                             most BYTES each way, one in a hundred over six times as many
 *   exact drive ADDRESS PORT COUNT BYTES SEED EVERY END...
 *                                             one in EVERY over six times as many, and only these ends
 *
 * The client says in 32 bytes what a connection is to be: its key, both lengths, and how it ends. The server answers
 * one byte, and the client waits until all have theirs. What is sent then is a stream of random numbers from the key,
 * so each side knows every byte it must get. Chunks, pauses of the sender, rests of the
 * reader and receive buffers are random, but always the same for the same seed.
 *
 * Ends: BOTH at once; the CLIENT ends first and the server sends only after that; the SERVER ends first and the
 * client sends only after that; the client RESETS once both have all bytes, or the server does (the other's last byte
 * says so, for a reset may overtake bytes); the client ABORTS in the middle. A reset must arrive as one, and never in
 * place of an end.
 */
#include "net.h"

#define CONNECTIONS_MAX 4096
#define CHUNK_MAX 65536
#define LIFETIME_S 60
#define RESTS_MAX 48
#define ENDING_US 10000000
#define MAGIC 0x6578616374000001ULL

enum end { BOTH, CLIENT_FIRST, SERVER_FIRST, CLIENT_RESETS, SERVER_RESETS, CLIENT_ABORTS, ENDS };
static const char *const end_names[] = { "both", "client_first", "server_first",
					 "client_resets", "server_resets", "client_aborts" };

struct order {
	uint64_t magic, key;
	uint32_t up, down, end, spare;
};

struct connection {
	int fd, used, greeted, sent_end, got_end, resets, awaits_reset, watched, rests;
	uint32_t ordered, to_send, to_get, sent, got;
	uint64_t send_key, get_key, random, pause_until, rest_until; /* from sending, from reading */
	struct order order;
};

static struct connection connections[CONNECTIONS_MAX];
static int epoll_, client_, open_, waiting, most_, go, finished, every = 100, wanted[16], wanted_count;
static unsigned long done[ENDS], wrong, early, broken;
static unsigned long long bytes_sent, bytes_got;

static uint8_t byte_at(uint64_t key, uint32_t at)
{
	return (uint8_t)(mix(key + at / 8) >> (at % 8 * 8));
}

static void fill(uint8_t *out, uint64_t key, uint32_t at, uint32_t count)
{
	uint32_t i = 0;

	while (i < count && (at + i) % 8)
		out[i] = byte_at(key, at + i), i++;
	for (; i + 8 <= count; i += 8) {
		uint64_t word = mix(key + (at + i) / 8);
		memcpy(out + i, &word, 8); /* little endian, as byte_at */
	}
	for (; i < count; i++)
		out[i] = byte_at(key, at + i);
}

static uint32_t chance(struct connection *c, uint32_t below)
{
	c->random = mix(c->random);
	return (uint32_t)(c->random >> 16) % below;
}

static void complain(struct connection *c, const char *what, int error)
{
	fprintf(stderr, "connection %ld (%s): %s%s%s; sent %u of %u, got %u of %u\n", (long)(c - connections),
		end_names[c->order.end], what, error ? ": " : "", error ? strerror(error) : "", c->sent, c->to_send,
		c->got, c->to_get);
}

static void release(struct connection *c, int reset)
{
	bytes_sent += c->sent;
	bytes_got += c->got;
	if (!c->greeted)
		waiting--;
	if (reset)
		reset_close(c->fd);
	else
		close(c->fd);
	c->used = 0;
	open_--;
	finished++;
}

static void fault(struct connection *c, unsigned long *counter, const char *what, int error)
{
	complain(c, what, error);
	++*counter;
	release(c, 1);
}

static void succeed(struct connection *c, int reset)
{
	done[c->order.end]++;
	release(c, reset);
}

/* May this side send now? */
static int may_send(const struct connection *c)
{
	if (!c->greeted || c->sent_end || (client_ && !go))
		return 0;
	if (c->awaits_reset && c->order.end != CLIENT_ABORTS && c->sent + 1 == c->to_send)
		return c->got == c->to_get;
	if (c->order.end == CLIENT_FIRST && !client_)
		return c->got_end;
	if (c->order.end == SERVER_FIRST && client_)
		return c->got_end;
	return 1;
}

static void rewatch(struct connection *c, uint64_t now)
{
	int events = EPOLLIN;
	struct epoll_event event = { .data.ptr = c };

	if (c->got_end || c->rest_until > now)
		events = 0;
	if (may_send(c) && c->pause_until <= now)
		events |= EPOLLOUT;
	if (events == c->watched)
		return;
	c->watched = event.events = events;
	if (epoll_ctl(epoll_, EPOLL_CTL_MOD, c->fd, &event))
		die("epoll_ctl");
}

static void ordered(struct connection *c)
{
	const struct order *o = &c->order;

	c->random = mix(o->key ^ (client_ ? 1 : 2));
	c->send_key = mix(o->key + (client_ ? 11 : 12));
	c->get_key = mix(o->key + (client_ ? 12 : 11));
	c->to_send = client_ ? o->up : o->down;
	c->to_get = client_ ? o->down : o->up;
	/* So that who reads slowly is waited for. With less room than the loopback device's two largest packets take, TCP at
	 * times goes on by its persist timer alone: 32 KB each 200 ms. */
	if (chance(c, 2)) {
		int small = 65536;
		setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	}
	if (o->end == CLIENT_RESETS || o->end == SERVER_RESETS) {
		c->resets = o->end == (client_ ? CLIENT_RESETS : SERVER_RESETS);
		c->awaits_reset = !c->resets;
		c->to_send += c->awaits_reset;
		c->to_get += c->resets;
	} else if (o->end == CLIENT_ABORTS) {
		c->awaits_reset = !client_;
		if (client_)
			c->to_send /= 2;
	}
}

/* Whether the connection still exists. */
static int both_ended(struct connection *c)
{
	if (!c->sent_end || !c->got_end)
		return 1;
	succeed(c, 0);
	return 0;
}

static int sender(struct connection *c, uint64_t now)
{
	static uint8_t data[CHUNK_MAX];
	uint32_t left = c->to_send - c->sent, size = 1 + chance(c, CHUNK_MAX);
	ssize_t count;

	if (left) {
		if (c->awaits_reset && c->order.end != CLIENT_ABORTS && left > 1)
			left--; /* the last byte says that we have all */
		if (size > left)
			size = left;
		fill(data, c->send_key, c->sent, size);
		count = send(c->fd, data, size, MSG_NOSIGNAL);
		if (count < 0 && errno == EAGAIN)
			return 1;
		if (count < 0 && c->order.end == CLIENT_ABORTS && (errno == ECONNRESET || errno == EPIPE)) {
			succeed(c, 0);
			return 0;
		}
		if (count < 0) {
			fault(c, &broken, "send", errno);
			return 0;
		}
		c->sent += count;
		if (c->to_send < 2000000 && chance(c, 4) == 0)
			c->pause_until = now + 1000 * chance(c, 60);
		return 1;
	}
	if (c->order.end == CLIENT_ABORTS && client_) {
		succeed(c, 1);
		return 0;
	}
	if (c->awaits_reset || c->resets) {
		c->sent_end = 1;
		if (!c->resets || c->got < c->to_get)
			return 1;
		succeed(c, 1);
		return 0;
	}
	c->sent_end = 1;
	if (shutdown(c->fd, SHUT_WR)) {
		fault(c, &broken, "shutdown", errno);
		return 0;
	}
	return both_ended(c);
}

static int receiver(struct connection *c, uint64_t now)
{
	static uint8_t data[CHUNK_MAX], wanted[CHUNK_MAX];
	ssize_t count = recv(c->fd, data, sizeof(data), 0);
	int whole = c->got == c->to_get && c->sent == c->to_send;

	if (count < 0 && errno == EAGAIN)
		return 1;
	if (count < 0) {
		if (errno == ECONNRESET && c->awaits_reset && (whole || c->order.end == CLIENT_ABORTS))
			succeed(c, 0);
		else
			fault(c, &broken, "recv", errno);
		return 0;
	}
	if (count == 0) {
		if (c->awaits_reset || c->resets) {
			fault(c, &early, "an end where a reset was due", 0);
			return 0;
		}
		if (c->got < c->to_get) {
			fault(c, &early, "too early an end", 0);
			return 0;
		}
		c->got_end = 1;
		return both_ended(c);
	}
	if (c->got + count > c->to_get) {
		fault(c, &wrong, "more bytes than were sent", 0);
		return 0;
	}
	fill(wanted, c->get_key, c->got, count);
	if (memcmp(wanted, data, count)) {
		fault(c, &wrong, "other bytes than were sent", 0);
		return 0;
	}
	c->got += count;
	if (c->rests < RESTS_MAX && chance(c, 16) == 0 && ++c->rests)
		c->rest_until = now + 1000 * chance(c, 60);
	if (c->resets && c->sent_end && c->got == c->to_get) {
		succeed(c, 1);
		return 0;
	}
	return 1;
}

/* The order, or its answer. */
static int greeting(struct connection *c)
{
	ssize_t count;

	if (client_) {
		uint8_t answer;
		count = recv(c->fd, &answer, 1, 0);
		if (count == 1 && answer == '!') {
			c->greeted = 1;
			waiting--;
			return 1;
		}
	} else {
		count = recv(c->fd, (char *)&c->order + c->ordered, sizeof(c->order) - c->ordered, 0);
		if (count > 0) {
			c->ordered += count;
			if (c->ordered < sizeof(c->order))
				return 1;
			if (c->order.magic == MAGIC && c->order.end < ENDS && send(c->fd, "!", 1, MSG_NOSIGNAL) == 1) {
				ordered(c);
				c->greeted = 1;
				waiting--;
				return 1;
			}
		}
	}
	if (count < 0 && errno == EAGAIN)
		return 1;
	fault(c, &broken, "greeting", count < 0 ? errno : 0);
	return 0;
}

static struct connection *take(int fd, int events)
{
	for (int i = 0; i < CONNECTIONS_MAX; i++) {
		struct connection *c = &connections[i];
		struct epoll_event event = { .events = events, .data.ptr = c };
		if (c->used)
			continue;
		memset(c, 0, sizeof(*c));
		c->fd = fd;
		c->used = 1;
		c->watched = events;
		if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event))
			die("epoll_ctl");
		waiting++;
		if (++open_ > most_)
			most_ = open_;
		return c;
	}
	fprintf(stderr, "too many connections\n");
	exit(3);
}

static void begin(const struct sockaddr_storage *target, socklen_t length, uint64_t seed, int number, uint32_t most)
{
	int fd = socket(target->ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	struct connection *c;

	if (fd < 0)
		die("socket");
	if (connect(fd, (const struct sockaddr *)target, length) && errno != EINPROGRESS)
		die("connect");
	c = take(fd, EPOLLOUT);
	c->order.magic = MAGIC;
	c->order.key = c->random = mix(seed * 1000003 + number);
	/* sizes of every magnitude, also none at all */
	c->order.up = chance(c, 20) ? chance(c, 1 + (most >> chance(c, 16))) : 0;
	c->order.down = chance(c, 20) ? chance(c, 1 + (most >> chance(c, 16))) : 0;
	if (number % every == every / 2) { /* more than any buffer on the way takes */
		c->order.up += 6 * most;
		c->order.down += 6 * most;
	}
	c->order.end = number % 10 < 7 ? number % 3 : 3 + (number % 10 - 7);
	if (wanted_count)
		c->order.end = wanted[number % wanted_count];
	ordered(c);
}

/* Connected: say what it is to be. */
static int announce(struct connection *c)
{
	int error = 0;
	socklen_t length = sizeof(error);

	getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (error || send(c->fd, &c->order, sizeof(c->order), MSG_NOSIGNAL) != sizeof(c->order)) {
		fault(c, &broken, "connect", error ? error : errno);
		return 0;
	}
	c->ordered = sizeof(c->order);
	return 1;
}

static void report(uint64_t began, uint64_t opened)
{
	printf("{\"most\": %d, \"open\": %d, \"wrong\": %lu, \"early\": %lu, \"broken\": %lu, "
	       "\"bytes_sent\": %llu, \"bytes_got\": %llu, \"opened_ms\": %.1f, \"took_ms\": %.1f",
	       most_, open_, wrong, early, broken, bytes_sent, bytes_got, (opened - began) / 1e3,
	       (now_us() - began) / 1e3);
	for (int i = 0; i < ENDS; i++)
		printf(", \"%s\": %lu", end_names[i], done[i]);
	printf("}\n");
}

static void serve_one(struct connection *c, int events, uint64_t now)
{
	if (client_ && !c->ordered) {
		if (announce(c))
			rewatch(c, now);
		return;
	}
	if (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
		if (!c->greeted ? !greeting(c) : !c->got_end && !receiver(c, now))
			return;
		/* an error with nothing left to read: all was said and this is the reset after it */
		if (c->got_end && events & EPOLLERR) {
			fault(c, &broken, "reset after the end", 0);
			return;
		}
	}
	if (events & EPOLLOUT && may_send(c) && c->pause_until <= now && !sender(c, now))
		return;
	rewatch(c, now);
}

static void want(const char *name)
{
	for (int i = 0; i < ENDS; i++)
		if (!strcmp(name, end_names[i]) && wanted_count < 16) {
			wanted[wanted_count++] = i;
			return;
		}
	fprintf(stderr, "%s is no end\n", name);
	exit(2);
}

static int run(int listener, int count)
{
	struct epoll_event events[256], event = { .events = EPOLLIN };
	uint64_t began = now_us(), opened = 0, until = 0, now;
	int was_go = 0;

	if (listener >= 0) {
		event.data.ptr = &epoll_; /* the listener */
		epoll_ctl(epoll_, EPOLL_CTL_ADD, listener, &event);
		printf("listening\n");
		event.data.ptr = NULL; /* standard input */
		epoll_ctl(epoll_, EPOLL_CTL_ADD, 0, &event);
	}
	while (client_ ? finished < count : !until || (open_ && now_us() < until)) {
		int ready = epoll_wait(epoll_, events, 256, 5);
		now = now_us();
		for (int i = 0; i < ready; i++) {
			struct connection *c = events[i].data.ptr;
			if (!c) {
				char text[64];
				if (read(0, text, sizeof(text)) > 0)
					continue;
				epoll_ctl(epoll_, EPOLL_CTL_DEL, 0, NULL);
				until = now + ENDING_US;
				continue;
			}
			if ((void *)c == (void *)&epoll_) {
				int fd;
				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
					take(fd, EPOLLIN);
				continue;
			}
			if (c->used)
				serve_one(c, events[i].events, now);
		}
		if (client_ && !go && !waiting) {
			go = 1;
			opened = now_us();
		}
		for (int i = 0; i < CONNECTIONS_MAX; i++)
			if (connections[i].used && connections[i].greeted &&
			    (was_go != go || connections[i].pause_until || connections[i].rest_until))
				rewatch(&connections[i], now);
		was_go = go;
	}
	report(began, opened);
	return wrong || early || broken;
}

int main(int count, char **words)
{
	struct sockaddr_storage target;
	socklen_t length;

	begin_process(LIFETIME_S);
	epoll_ = epoll_create1(EPOLL_CLOEXEC);
	if (count == 3 && !strcmp(words[1], "serve"))
		return run(listen_on(atoi(words[2])), 0);
	if ((count == 7 || (count > 8 && atoi(words[7]) > 0)) && !strcmp(words[1], "drive")) {
		client_ = 1;
		if (count > 8)
			every = atoi(words[7]);
		for (int i = 8; i < count; i++)
			want(words[i]);
		length = parse_address(words[2], atoi(words[3]), &target);
		for (int i = 0; i < atoi(words[4]); i++)
			begin(&target, length, strtoull(words[6], NULL, 0), i, strtoul(words[5], NULL, 0));
		return run(-1, atoi(words[4]));
	}
	fprintf(stderr, "usage: exact serve PORT | exact drive ADDRESS PORT COUNT BYTES SEED [EVERY END...]\n");
	return 2;
}
