/* The most that one thread can move through a TAP device with a system call a frame: what a back-end on that TAP
 * cannot exceed. And what fills a TAP's queue for those who read it.
 *
 *     tap_loop write TAP BYTES BUFFERS HUGE   each command: write for so many milliseconds
 *     tap_loop read TAP BYTES BUFFERS HUGE    each command: read until the queue is empty
 *     tap_loop feed TAP BYTES BUFFERS HUGE    each command: send so many frames to the TAP, as the kernel would
 *
 * BYTES: length of a frame; more than an Ethernet frame can be is one TCP segment to be cut up. A command is a line with
 * a number; the answer to each is a line: FRAMES NANOSECONDS, the latter of processor time. The vectors are those of the
 * device: net header, the guest's buffer and, when reading, room for what does not fit. The buffers are used in random
 * order, as those of a guest that has run for a while. HUGE: 1: they lie in huge pages.
 *
 * Built and run by tools/bench.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define HEADER sizeof(struct virtio_net_hdr_mrg_rxbuf) /* of the TAP; virtio's with its num_buffers */
#define HEADERS 54                                     /* Ethernet, IPv4, TCP */
#define SEGMENT 1460
#define TAIL 66048
#define LOOKS 64 /* frames between two looks at the clock */

static size_t bytes, buffers, room;
static uint8_t *memory;
static uint32_t *order;
static uint8_t header[HEADER], tail[TAIL]; /* what is written; what is read overwrites it */

static void must(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "tap_loop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void shuffle(void)
{
    uint64_t random = 88172645463325252u; /* xorshift: the same order each time */

    for (size_t i = 0; i < buffers; i++)
        order[i] = (uint32_t)i;
    for (size_t i = buffers - 1; i > 0; i--) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        size_t other = random % (i + 1);
        uint32_t here = order[i];
        order[i] = order[other], order[other] = here;
    }
}

static void make_buffers(int huge)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | (huge ? MAP_HUGETLB : 0);
    size_t length = (room * buffers + (2 << 20) - 1) >> 21 << 21;

    memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    order = calloc(buffers, sizeof(*order));
    must(order != NULL, "calloc");
    shuffle();
}

/* An IPv4 frame to an address that is not ours, so that nobody answers: UDP or, when it is too long for Ethernet, TCP. */
static void make_frame(uint8_t *frame)
{
    static const uint8_t ethernet[] = {2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0};
    int tcp = bytes > ETHER_MAX_LEN;
    uint8_t ip[20] = {0x45, 0, (uint8_t)((bytes - 14) >> 8), (uint8_t)(bytes - 14), 0, 0, 0x40, 0, 64,
                      tcp ? IPPROTO_TCP : IPPROTO_UDP, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2};
    uint32_t sum = 0;

    for (int i = 0; i < 20; i += 2)
        sum += (uint32_t)(ip[i] << 8 | ip[i + 1]);
    sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
    ip[10] = (uint8_t)(sum >> 8), ip[11] = (uint8_t)sum;
    memset(frame, 0, bytes);
    memcpy(frame, ethernet, sizeof(ethernet));
    memcpy(frame + sizeof(ethernet), ip, sizeof(ip));
    if (!tcp)
        return;
    frame[46] = 0x50; /* the TCP header has 5 words */
    struct virtio_net_hdr h = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
                               .hdr_len = HEADERS, .gso_size = SEGMENT, .csum_start = 34, .csum_offset = 16};
    memcpy(header, &h, sizeof(h));
}

static int open_tap(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), size = HEADER;

    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    must(fd >= 0 && ioctl(fd, TUNSETIFF, &request) == 0, name);
    must(ioctl(fd, TUNSETVNETHDRSZ, &size) == 0, "TUNSETVNETHDRSZ");
    must(ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) == 0, "TUNSETOFFLOAD");
    return fd;
}

static uint64_t write_for(int fd, uint64_t milliseconds)
{
    static size_t at;
    uint64_t end = now(CLOCK_MONOTONIC) + milliseconds * 1000000, frames = 0;

    do
        for (int i = 0; i < LOOKS; i++) {
            struct iovec iov[] = {{header, HEADER}, {memory + order[at] * room, bytes}};
            must(writev(fd, iov, 2) == (ssize_t)(HEADER + bytes), "writev");
            at = at + 1 < buffers ? at + 1 : 0;
            frames++;
        }
    while (now(CLOCK_MONOTONIC) < end);
    return frames;
}

static uint64_t read_all(int fd)
{
    static size_t at;
    uint64_t frames = 0;

    for (;;) {
        struct iovec iov[] = {{header, HEADER}, {memory + order[at] * room, room}, {tail, TAIL}};
        if (readv(fd, iov, 3) < 0) {
            must(errno == EAGAIN, "readv");
            return frames;
        }
        at = at + 1 < buffers ? at + 1 : 0;
        frames++;
    }
}

static int open_feed(const char *name)
{
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(name)};
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), one = 1;

    must(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0, name);
    must(setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) == 0, "PACKET_VNET_HDR");
    must(setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)) == 0, "PACKET_QDISC_BYPASS");
    return fd;
}

static uint64_t feed(int fd, uint64_t wanted)
{
    uint64_t frames = 0;
    struct iovec iov[] = {{header, sizeof(struct virtio_net_hdr)}, {memory, bytes}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};

    while (frames < wanted && sendmsg(fd, &message, 0) > 0)
        frames++;
    must(frames == wanted || errno == ENOBUFS, "sendmsg");
    return frames;
}

int main(int argc, char **argv)
{
    char line[32];

    must(argc == 6, "usage: tap_loop write|read|feed TAP BYTES BUFFERS HUGE");
    int reads = argv[1][0] == 'r', feeds = argv[1][0] == 'f';
    bytes = strtoul(argv[3], NULL, 10);
    buffers = feeds ? 1 : strtoul(argv[4], NULL, 10);
    room = ((bytes > 1526 ? bytes : 1526) + 2047) / 2048 * 2048;
    make_buffers(!feeds && atoi(argv[5]));
    for (size_t i = 0; i < buffers; i++)
        make_frame(memory + i * room);
    int fd = feeds ? open_feed(argv[2]) : open_tap(argv[2]);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        uint64_t number = strtoull(line, NULL, 10), began = now(CLOCK_THREAD_CPUTIME_ID);
        uint64_t frames = feeds ? feed(fd, number) : reads ? read_all(fd) : write_for(fd, number);
        printf("%llu %llu\n", (unsigned long long)frames,
               (unsigned long long)(now(CLOCK_THREAD_CPUTIME_ID) - began));
        fflush(stdout);
    }
    return 0;
}
