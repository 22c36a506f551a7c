/* A driver's threads against the pump, for ThreadSanitizer: every frame that is sent comes back on the
 * receiveq, and whatever one side writes before it publishes, the other may read after it has looked.
 *
 *     two_threads FEATURES SIZE FRAMES PIECES INDIRECT BUSY_POLL
 */
#include "guest.h"

static struct flow_config flow(const struct guest *g, const struct queue *q)
{
    return (struct flow_config){
        .queue = queue_device(g, q), .enabled = 1, .kick = q->kick, .call = q->call, .err = -1};
}

static uint64_t errors(const struct driver_stats *s)
{
    uint64_t sum = 0;

    for (int i = 0; i < DRIVER_ERRORS; i++)
        sum += s->errors[i];
    return sum;
}

int main(int argc, char **argv)
{
    MUST(argc == 7);
    uint64_t features = strtoull(argv[1], NULL, 0), frames = strtoull(argv[3], NULL, 0);
    uint32_t size = (uint32_t)strtoul(argv[2], NULL, 0);
    struct guest g;
    int port[2], buffer = 1 << 20;

    MUST(guard_install() == RING_OK);
    guest_open(&g);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, port) == 0);
    MUST(setsockopt(port[0], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)) == 0);
    struct queue transmitq = queue_make(&g, features, size), receiveq = queue_make(&g, features, size);

    struct driver_config c = queue_driver(&transmitq, DRIVER_TRANSMIT);
    c.frames = frames;
    c.pieces = (uint32_t)strtoul(argv[4], NULL, 0);
    c.indirect = atoi(argv[5]);
    c.busy_poll = atoi(argv[6]);
    struct driver *source = driver_make(&g, c);
    c = queue_driver(&receiveq, DRIVER_RECEIVE);
    c.frames = frames;
    c.busy_poll = atoi(argv[6]);
    struct driver *sink = driver_make(&g, c);

    struct pump *pump = pump_new(eventfd(0, EFD_NONBLOCK));
    struct lane *lane = lane_new();
    MUST(pump && lane);
    struct lane_config config = {.from_guest = flow(&g, &transmitq),
                                 .to_guest = flow(&g, &receiveq),
                                 .to_port = port[0],
                                 .from_port = port[1],
                                 .port_header = 12,
                                 .max_frame = 65550,
                                 .features = features};
    MUST(lane_configure(lane, &config) == RING_OK);
    MUST(pump_attach(pump, lane) == RING_OK);
    MUST(driver_start(sink) == 0 && driver_start(source) == 0);
    bool done = driver_wait(source, 100000) && driver_wait(sink, 100000);
    struct driver_stats sent, received;
    driver_stats_get(source, &sent);
    driver_stats_get(sink, &received);
    driver_free(source);
    driver_free(sink);
    MUST(pump_detach(pump, lane, 5000) == RING_OK);
    pump_free(pump);
    lane_free(lane);
    vq_free(config.from_guest.queue);
    vq_free(config.to_guest.queue);
    guestmem_free(g.table);
    printf("frames %llu received %llu errors %llu\n", (unsigned long long)sent.frames,
           (unsigned long long)received.frames, (unsigned long long)(errors(&sent) + errors(&received)));
    return done ? 0 : 1;
}
