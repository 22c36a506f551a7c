/* What a driver has set about what it receives, under sanitizers: packets of any bytes in memory of exactly their size;
 * settings and lanes that change while several workers send; calls that are put off while drivers sleep. */
#define _GNU_SOURCE
#include <pthread.h>

#include "station.h"
#include "../../ring/plane/batch.h"

#define PACKETS 20000
#define FRAMES 2000
#define LONGEST 700

/* ------------------------------------------------------------------------------------------------ packets */

/* Bytes that are worth standing anywhere: protocols, headers, lengths. */
static const uint8_t likely_bytes[] = {0,    1,  2,  4,  5,  6,  8,  17, 24, 41,   43,   44,   47,   50,   51,   58,   59,
                                       60, 135, 139, 140, 201, 255, 0x45, 0x46, 0x4f, 0x60, 0x86, 0xdd, 0x81, 0x88, 0xa8};
/* Where a packet's bytes matter, of the beginnings below. */
static const char *const beginnings[] = {
    /* Ethernet, IPv4, UDP to VXLAN's port, VXLAN, Ethernet, IPv6, destination options */
    "020000000001020000000002" "0800" "4500010000000000401100000a0000010a000002" "0c0012b500f00000" "0800000000000500"
    "020000000003020000000004" "86dd" "6000000000643c40" "20010db8000000000000000000000001"
    "20010db8000000000000000000000002" "0602010000c910" "20010db8000000000000000000000003",
    /* VLAN tags, IPv6, routing header of type 2, destination options, TCP */
    "020000000001020000000002" "88a80001" "81000002" "86dd" "6000000000782b40" "20010db8000000000000000000000001"
    "20010db8000000000000000000000002" "3c02020100000000" "20010db8000000000000000000000005" "0602010000c910"
    "20010db8000000000000000000000004",
    /* IPv4, GRE with a key, IPv4, TCP */
    "020000000001020000000002" "0800" "4600000000000000402f00000a0000010a00000201010101" "2000080000000007"
    "4500003c00000000400600000a0000030a000004" "01bb1000",
    /* IPv6, UDP to GENEVE's port, GENEVE with options, IPv6 */
    "020000000001020000000002" "86dd" "6000000000c81140" "20010db8000000000000000000000001"
    "20010db8000000000000000000000002" "0c0017c100c80000" "020086dd00000500" "0102030405060708"
    "6000000000141740" "20010db8000000000000000000000006" "20010db8000000000000000000000007",
};

static uint8_t digit(char c)
{
    return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10);
}

static uint32_t from_hex(const char *digits, uint8_t *bytes)
{
    uint32_t count = 0;

    for (; *digits; digits += 2)
        bytes[count++] = (uint8_t)(digit(digits[0]) << 4 | digit(digits[1]));
    return count;
}

/* Each packet lies in a block of its own, so that a byte too many is seen. */
TEST(hash_of_anything)
{
    struct receive_settings s = {.hash_types = 0x1ff};
    uint64_t random = 11, reports[10] = {0};
    uint8_t packet[LONGEST];

    for (uint32_t i = 0; i < RSS_KEY; i++)
        s.key[i] = (uint8_t)(i * 7 + 1);
    for (uint32_t round = 0; round < PACKETS; round++) {
        for (uint32_t i = 0; i < LONGEST; i += 8) {
            uint64_t more = next_random(&random);
            memcpy(packet + i, &more, i + 8 <= LONGEST ? 8 : LONGEST - i);
        }
        from_hex(beginnings[next_random(&random) % 4], packet);
        for (uint64_t changes = next_random(&random) % 6; changes; changes--)
            packet[12 + next_random(&random) % 120] = likely_bytes[next_random(&random) % sizeof(likely_bytes)];
        uint32_t length = 14 + (uint32_t)(next_random(&random) % (round % 2 ? LONGEST - 14 : 150)), value, again;
        uint8_t *exact = malloc(length);
        CHECK(exact);
        memcpy(exact, packet, length);
        s.tunnel_types = (uint32_t)(next_random(&random) % 2 ? 0x1ff : next_random(&random) & 0x1ff);
        uint32_t report = receive_hash(&s, exact, length, &value);
        CHECK(report < 10);
        CHECK(report || !value);
        CHECK_EQ(receive_hash(&s, exact, length, &again), report);
        CHECK_EQ(again, value);
        s.modes = (uint32_t)(next_random(&random) & 0xff);
        CHECK(receive_refuses(&s, exact, length) >> 1 == 0);
        reports[report]++;
        free(exact);
    }
    for (uint32_t i = 0; i < 10; i++)
        CHECK(reports[i] > 0);
}

/* "Verifying the RSS Hash Calculation", Windows driver documentation: one vector for each length of the input. */
TEST(known_answers)
{
    static const struct {
        const char *input;
        uint32_t hash;
    } vectors[] = {
        {"420995bba18e6450", 0x323e8fc2},
        {"420995bba18e64500aea06e6", 0x51ccc178},
        {"3ffe250102001fff00000000000000073ffe2501020000030000000000000001", 0x2cc18cd5},
        {"3ffe250102001fff00000000000000073ffe25010200000300000000000000010aea06e6", 0x40207d3d},
    };
    uint8_t key[RSS_KEY], input[RSS_INPUT];

    CHECK_EQ(from_hex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa", key), RSS_KEY);
    for (size_t i = 0; i < sizeof(vectors) / sizeof(*vectors); i++)
        CHECK_EQ(receive_toeplitz(key, input, from_hex(vectors[i].input, input)), vectors[i].hash);
}

/* ------------------------------------------------------------------------------------------------ switch */

static void source(struct station *s, uint64_t ring, uint8_t from, uint64_t frames)
{
    struct driver_config c = {.role = DRIVER_TRANSMIT, .features = ring, .frames = frames, .batch = 8, .frame_bytes = 200};

    station_prefix(&c, from, 255);
    station_driver(s, &c);
}

static void sink(struct station *s, uint64_t ring, uint8_t from)
{
    struct driver_config c = {.role = DRIVER_RECEIVE, .features = ring, .size = 256};

    station_prefix(&c, from, 255);
    station_driver(s, &c);
}

static void no_errors(const struct driver *d)
{
    struct driver_stats s;

    driver_stats_get(d, &s);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(s.errors[i], 0);
}

/* Two send to one whose driver changes its mind all the time; every frame is received, or counted. */
static void settings_under_traffic(uint64_t ring)
{
    struct fabric *f = fabric_new(1);
    struct station s[3];
    struct receive_settings open = {.modes = RECEIVE_BY_ADDRESS, .hash_types = 0x1ff, .rss = 1};
    struct receive_settings shut = {.modes = RECEIVE_BY_ADDRESS | RECEIVE_NO_BROADCAST | RECEIVE_BY_VLAN};
    struct lane_stats stats;

    for (int i = 0; i < 3; i++)
        station_init(&s[i], f);
    source(&s[0], ring, 1, FRAMES);
    source(&s[1], ring, 2, FRAMES);
    sink(&s[2], ring, 1);
    CHECK_EQ(member_receive(s[2].member, &open, 1000), RING_OK);
    for (int i = 0; i < 3; i++)
        station_attach(&s[i]);
    CHECK_EQ(driver_start(s[2].sink), 0);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(driver_start(s[i].source), 0);
    for (int change = 0; !driver_wait(s[0].source, 0) || !driver_wait(s[1].source, 0); change++) {
        station_detach(&s[2]);
        CHECK_EQ(member_receive(s[2].member, change % 2 ? &open : &shut, 10000), RING_OK);
        station_attach(&s[2]);
        usleep(300);
    }
    for (int i = 0; i < 3; i++)
        station_detach(&s[i]);
    lane_stats_get(s[2].lane, &stats);
    struct member_missed missed;
    member_missed(s[2].member, &missed);
    CHECK_EQ(stats.to_guest.frames + station_lost(&s[2]) + missed.unwanted, 2 * FRAMES);
    CHECK(missed.unwanted > 0);
    CHECK(stats.to_guest.frames > 0);
    no_errors(s[0].source);
    no_errors(s[1].source);
    no_errors(s[2].sink);
    for (int i = 0; i < 3; i++)
        station_end(&s[i]);
    fabric_free(f);
}
EACH_FORMAT(settings_under_traffic)

/* A member with settings leaves the switch and another one comes, while somebody sends: what the sender is looking at
 * stays until it has done so. */
static void comes_and_goes(uint64_t ring)
{
    struct fabric *f = fabric_new(3);
    struct station s[2];
    struct receive_settings all = {.hash_types = 0x1ff, .tunnel_types = 0x1ff, .rss = 1};
    struct lane_stats stats;

    for (int i = 0; i < 2; i++)
        station_init(&s[i], f);
    source(&s[0], ring, 1, FRAMES);
    sink(&s[1], ring, 1);
    CHECK_EQ(member_receive(s[1].member, &all, 1000), RING_OK);
    for (int i = 1; i >= 0; i--)
        station_attach(&s[i]);
    CHECK_EQ(driver_start(s[1].sink), 0);
    CHECK_EQ(driver_start(s[0].source), 0);
    while (!driver_wait(s[0].source, 0)) {
        station_detach(&s[1]);
        fabric_leave(s[1].member);
        s[1].member = s[1].config.member = fabric_join(f, 0);
        CHECK_EQ(member_receive(s[1].member, &all, 1000), RING_OK);
        station_attach(&s[1]);
        usleep(100);
    }
    station_detach(&s[0]);
    station_detach(&s[1]);
    lane_stats_get(s[1].lane, &stats);
    CHECK(stats.to_guest.frames > 0);
    no_errors(s[0].source);
    no_errors(s[1].sink);
    station_end(&s[0]);
    station_end(&s[1]);
    fabric_free(f);
}
EACH_FORMAT(comes_and_goes)

/* Both drivers sleep until they are called, and both want few calls: nothing stands still, and the receiver, whose ring
 * others fill, gets fewer calls than frames. Lanes come and go meanwhile. */
static void coalesced(uint64_t ring)
{
    struct fabric *f = fabric_new(2);
    struct station s[2];
    struct lane_stats sends, gets;

    for (int i = 0; i < 2; i++)
        station_init(&s[i], f);
    source(&s[0], ring, 1, FRAMES);
    sink(&s[1], ring, 1);
    s[0].config.from_guest.call_packets = s[1].config.to_guest.call_packets = 40;
    s[0].config.from_guest.call_usecs = s[1].config.to_guest.call_usecs = 500;
    for (int i = 1; i >= 0; i--)
        station_attach(&s[i]);
    CHECK_EQ(driver_start(s[1].sink), 0);
    CHECK_EQ(driver_start(s[0].source), 0);
    for (int round = 0; !driver_wait(s[0].source, 0); round++) {
        station_detach(&s[round % 2]);
        station_attach(&s[round % 2]);
        usleep(2000);
    }
    station_detach(&s[0]);
    station_detach(&s[1]);
    lane_stats_get(s[0].lane, &sends);
    lane_stats_get(s[1].lane, &gets);
    CHECK_EQ(sends.from_guest.frames, FRAMES);
    CHECK_EQ(gets.to_guest.frames + station_lost(&s[1]), FRAMES);
    CHECK(gets.to_guest.frames > 0);
    struct driver_stats got;
    for (int i = 0; i < 10000; i++) {
        driver_stats_get(s[1].sink, &got);
        if (got.frames == gets.to_guest.frames)
            break;
        usleep(1000);
    }
    CHECK_EQ(got.frames, gets.to_guest.frames);
    no_errors(s[0].source);
    no_errors(s[1].sink);
    for (int i = 0; i < 2; i++)
        station_end(&s[i]);
    fabric_free(f);
}

static void coalesced_by_events(uint64_t ring) { coalesced(ring | EVENT_IDX); }
EACH_RING(coalesced)
EACH_RING(coalesced_by_events)
